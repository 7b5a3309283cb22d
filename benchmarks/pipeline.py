#!/usr/bin/env python
"""Pipeline schedules: what they take, what was predicted, and what others take.

    OMP_NUM_THREADS=1 python benchmarks/pipeline.py predicted              # 2 ranks
    OMP_NUM_THREADS=1 python benchmarks/pipeline.py predicted --ranks 4
    OMP_NUM_THREADS=1 python benchmarks/pipeline.py overhead --ranks 1
    OMP_NUM_THREADS=1 python benchmarks/pipeline.py overhead --ranks 2
    python benchmarks/pipeline.py peers                                    # 2 ranks
    python benchmarks/pipeline.py peers --ranks 4

predicted: forwards and backwards of 8 microbatches under each schedule, beside what
`megalite.pipeline.simulate` makes of the mean times of the actions of the same steps and of the
time of a transfer. Where there are more ranks than cores, actions are timed by the CPU seconds of
their thread. The step is then not that of the clock, in which ranks share cores, but the one that
as many cores as ranks would take: the same steps with each action's own CPU seconds, and those of
the engine between two actions.

overhead: the engine on stages that compute next to nothing, beside the same computations and
messages written out without it, and beside torch.distributed.pipelining; per action.

peers: tokens per second of whole training steps, beside torch.distributed.pipelining and
Megatron-core on models of the same shape; `make benchmark-peers` installs them.

The model of `predicted` and `peers` is a GPT of 8 layers, hidden 512, 8 heads, sequence 256,
vocabulary 1024 (so that the head costs a sixth of a layer, and stages take about equally long),
untied, microbatch 1, fp32, one thread a rank. Tables are in Markdown: medians of the rounds, and
ratios within a round (least .. most). --small makes the model and the rounds small, to try the
script.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "peers"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import megalite.programs.start  # noqa: F401  first: says which Python is needed

# isort: split
import argparse
import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.distributed as dist  # noqa: TID251 - its own calls are what is compared
from compare import (
    FOLDER,
    OURS,
    PEER_PYTHON,
    Contender,
    Measurement,
    Side,
    installed,
    megatron,
    say,
    spread,
    torch_peer,
    warmed_up,
)
from rank import Shape
from torch import multiprocessing, nn
from train_megalite import SCHEDULES, layout_config, our_parts
from train_torch import SCHEDULES as TORCH_SCHEDULES

from megalite.models.batch import Microbatch
from megalite.parallel.collectives import gather_objects, receive, send
from megalite.parallel.config import ParallelConfig
from megalite.parallel.context import ParallelContext
from megalite.parallel.launch import LaunchInfo
from megalite.parallel.layout import ParallelLayout
from megalite.pipeline.engine import PipelineEngine
from megalite.pipeline.messages import Step, is_sent, made, needed, program
from megalite.pipeline.schedules import (
    FORWARD,
    WEIGHT,
    Action,
    Pipeline,
    pipeline_of,
    training_orders,
)
from megalite.pipeline.simulate import Timeline, simulate

SHAPE = Shape(vocab=1024, micro_batch=1, microbatches=8)
SMALL = Shape(hidden=64, heads=4, seq=32, vocab=128, micro_batch=1, microbatches=8)
CHEAP = (1, 1, 8)
"""Hidden states [s, b, h] of stages that compute next to nothing."""


# Steps beside their simulation ------------------------------------------------------------------


class Taken(NamedTuple):
    """An action of a step of one rank."""

    action: Action
    seconds: float
    cpu_seconds: float
    cpu_before: float
    """CPU seconds of this thread since the action before it: the engine's own."""


def watch(engine: PipelineEngine) -> list[Taken]:
    """Time the engine's actions; returns the list that they are added to."""
    compute = engine._compute
    taken: list[Taken] = []
    ended = 0.0

    def timed(run, action: Action, arrived):
        nonlocal ended
        cpu = time.thread_time()
        began = time.perf_counter()
        output = compute(run, action, arrived)
        seconds = time.perf_counter() - began
        before = cpu - ended if taken else 0.0
        ended = time.thread_time()
        taken.append(Taken(action, seconds, ended - cpu, before))
        return output

    engine._compute = timed
    return taken


class Watched:
    """A schedule on this rank, whose steps can be compared with its simulation."""

    def __init__(self, name: str, shape: Shape, context: ParallelContext):
        self.group = context.pipeline
        config = layout_config(f"pp{self.group.size}-{name}", shape, self.group.size)
        self.pipeline = pipeline_of(config.parallel)
        self.orders = training_orders(config.parallel, shape.microbatches)
        self.by_clock = self.group.size <= len(os.sched_getaffinity(0))
        parts, data = our_parts(config, context)
        self.batch = data.at(0)
        self.engine = parts.engine
        self.gradients = parts.optimizer.gradients
        self.taken = watch(parts.engine)

    def step(self, transfer: float) -> tuple[float, dict[Action, float]]:
        """(seconds of a step over all ranks, seconds of each of its actions), on every rank."""
        self.gradients.zero()
        self.taken.clear()
        dist.barrier()
        began = time.monotonic()  # one clock for all processes of a machine
        self.engine.train_step(*self.batch)
        span = (began, time.monotonic())
        ranks = gather_objects((span, list(self.taken)), self.group)
        actions = [taken for _, of_rank in ranks for taken in of_rank]
        if self.by_clock:
            seconds = max(end for (_, end), _ in ranks) - min(begin for (begin, _), _ in ranks)
            return seconds, {taken.action: taken.seconds for taken in actions}
        whole = {taken.action: taken.cpu_before + taken.cpu_seconds for taken in actions}
        seconds = self.simulated(whole.__getitem__, transfer).seconds
        return seconds, {taken.action: taken.cpu_seconds for taken in actions}

    def simulated(self, seconds: Callable[[Action], float], transfer: float) -> Timeline:
        """The schedule with these times."""
        return simulate(self.orders, self.pipeline, seconds, transfer)

    def round(self, steps: int, transfer: float) -> tuple[float, Timeline]:
        """(median seconds of some steps, the timeline by their mean action times)."""
        times = defaultdict(list)
        walls = []
        for _ in range(steps):
            wall, actions = self.step(transfer)
            walls.append(wall)
            for action, seconds in actions.items():
                times[action.kind, action.stage].append(seconds)
        means = {key: statistics.mean(seconds) for key, seconds in times.items()}
        timeline = self.simulated(lambda a: means[a.kind, a.stage], transfer)
        return statistics.median(walls), timeline


def transfer_seconds(context: ParallelContext, shape: Shape) -> float:
    """Of hidden states between the first two ranks, the others idle: half of a round trip."""
    group = context.pipeline
    tensor = torch.zeros(shape.seq, shape.micro_batch, shape.hidden)
    trips = 20
    for _ in range(2):  # the first one connects
        dist.barrier()
        began = time.perf_counter()
        for _ in range(trips):
            if group.rank < 2:
                for sender in (0, 1):
                    if group.rank == sender:
                        send(tensor, 1 - sender, group).wait()
                    else:
                        receive(tensor, sender, group).wait()
        seconds = (time.perf_counter() - began) / trips / 2
    dist.barrier()
    return gather_objects(seconds, group)[0]


def predicted(context: ParallelContext, args: argparse.Namespace) -> None:
    """Measure every schedule in turn; rank 0 prints the table."""
    shape = SMALL if args.small else SHAPE
    transfer = transfer_seconds(context, shape)
    schedules = {name: Watched(name, shape, context) for name in SCHEDULES}
    for schedule in schedules.values():
        schedule.round(2, transfer)
    rounds: dict[str, list] = {name: [] for name in schedules}
    for i in range(args.rounds):
        for name, schedule in schedules.items():
            rounds[name].append(schedule.round(args.steps, transfer))
            if context.rank == 0:
                say(f"round {i + 1} | {name}: {rounds[name][-1][0]:.3f} s")
    if context.rank > 0:
        return
    clock = "wall" if schedules["1f1b"].by_clock else "CPU"
    print(
        f"{context.world_size} ranks, {clock} seconds, a transfer {1000 * transfer:.2f} ms; "
        f"{args.rounds} rounds of {args.steps} steps\n"
    )
    print(
        "| | measured, ms | simulated, ms | measured / simulated | simulated bubble "
        "| 1F1B / this, measured | simulated |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, measured in rounds.items():
        pairs = list(zip(rounds["1f1b"], measured))
        cells = [
            name,
            f"{1000 * statistics.median(seconds for seconds, _ in measured):.0f}",
            f"{1000 * statistics.median(line.seconds for _, line in measured):.0f}",
            spread([seconds / line.seconds for seconds, line in measured]),
            f"{statistics.median(line.bubble for _, line in measured):.1%}",
            spread([plain[0] / this[0] for plain, this in pairs]),
            spread([plain[1].seconds / this[1].seconds for plain, this in pairs]),
        ]
        print(f"| {' | '.join(cells)} |")


# The engine's own time --------------------------------------------------------------------------


class CheapStage(nn.Module):
    """A stage that multiplies by a weight; the last one returns the sum, a loss of one term."""

    def __init__(self, number: int, stages: int):
        super().__init__()
        self.is_first = number == 0
        self.is_last = number == stages - 1
        self.weight = nn.Parameter(torch.ones(CHEAP[-1]))

    def forward(self, x: torch.Tensor | None, batch: Microbatch | None = None) -> torch.Tensor:
        """[s, b, h] -> [s, b, h] or [1]."""
        x = (batch.tokens if x is None else x) * self.weight
        return x.sum().view(1) if self.is_last else x


class WithoutEngine:
    """A step's computations and messages, in the engine's order, with nothing around them."""

    def __init__(self, engine: PipelineEngine, steps: list[Step]):
        self.stages = engine.stages
        rank_of = engine.pipeline.rank_of
        self.lines = []
        for step in steps:
            sent = made(step.action, engine.pipeline)
            target = rank_of(sent.target) if is_sent(sent, engine.pipeline) else None
            receives = [(message, rank_of(message.source)) for message in step.receives]
            wanted = needed(step.action, engine.pipeline)
            self.lines.append((receives, wanted, step.action, sent, target))

    def step(self, batches: list[Microbatch]) -> None:
        """Run it."""
        arriving: dict = {}
        held: dict = {}
        sending = []
        for receives, wanted, action, sent, target in self.lines:
            for message, source in receives:
                tensor = torch.empty(CHEAP)
                arriving[message] = (dist.irecv(tensor, source), tensor)
            arrived = None
            if wanted is not None:
                work, arrived = arriving.pop(wanted)
                if work is not None:
                    work.wait()
            if action.kind == FORWARD:
                if arrived is not None:
                    arrived.requires_grad_()
                output = self.stages[action.stage](arrived, batches[action.microbatch])
                held[action[1:]] = (arrived, output)
                output = output.detach()
            elif action.kind == WEIGHT:
                output = None
            else:
                received, start = held.pop(action[1:])
                start.backward(arrived)
                output = None if received is None else received.grad
            if target is not None:
                sending.append((dist.isend(output, target), output))
            elif sent is not None:
                arriving[sent] = (None, output)
        for work, _ in sending:
            work.wait()


def torch_cheap_step(name: str, ranks: int, microbatches: int) -> Callable[[], None]:
    """A step of torch.distributed.pipelining on the same stages."""
    from torch.distributed import pipelining  # noqa: TID251 - a peer

    rank = dist.get_rank()
    kind, chunks = TORCH_SCHEDULES[name]
    count = ranks * chunks
    numbers = [rank, count - 1 - rank] if name == "zb-v" else list(range(rank, count, ranks))
    stages = []
    for number in numbers:
        stage = CheapStage(number, count)
        stages.append(pipelining.PipelineStage(stage, number, count, torch.device("cpu")))
    make = getattr(pipelining, kind)
    takes_one = issubclass(make, pipelining.schedules.PipelineScheduleSingle)
    schedule = make(
        stages[0] if takes_one else stages, microbatches, loss_fn=lambda output, _: output.sum()
    )
    inputs = [torch.ones(microbatches, *CHEAP[1:])] if 0 in numbers else []
    last = {"target": torch.zeros(microbatches)} if count - 1 in numbers else {}
    return lambda: schedule.step(*inputs, **last)


PEER_OF = {"1f1b": "1f1b", "gpipe": "gpipe", "interleaved": "interleaved"}
PEER_OF |= {"zb-h1": "zb-1", "zb-v": "zb-v"}
"""torch's schedule that is ours."""


def overhead(context: ParallelContext, args: argparse.Namespace) -> None:
    """Time the engine on cheap stages, and the same without it; rank 0 prints the table."""
    ranks = context.world_size
    microbatches = 8 if args.small else 64
    print_once = print if context.rank == 0 else lambda line: None
    print_once(
        f"{ranks} ranks, {microbatches} microbatches, {args.rounds} rounds of {args.steps} steps; "
        "microseconds per action, by the clock and CPU time of rank 0's thread\n"
    )
    print_once(
        "| | actions | engine | without it | the engine's own | torch | CPU: engine | without it "
        "| the engine's own | torch |"
    )
    print_once("|---|---|---|---|---|---|---|---|---|---|")
    for name in SCHEDULES:
        config = ParallelConfig(pipeline_model_parallel_size=ranks, pipeline_schedule=name)
        pipeline: Pipeline = pipeline_of(config)
        orders = training_orders(config, microbatches)
        stages = {}
        for number in pipeline.stages_of(context.rank):
            stages[number] = CheapStage(number, pipeline.stages)
        model = SimpleNamespace(by_number=stages, hidden_shape=lambda b: CHEAP, dtype=torch.float32)
        engine = PipelineEngine(model, context, 1, config)
        batches = [Microbatch(tokens=torch.ones(CHEAP)) for _ in range(microbatches)]
        bare = WithoutEngine(engine, program(simulate(orders, pipeline), pipeline, context.rank))
        sides = {
            "engine": lambda engine=engine, batches=batches: engine.train_step(batches, [1.0]),
            "bare": lambda bare=bare, batches=batches: bare.step(batches),
        }
        if ranks > 1:
            sides["torch"] = torch_cheap_step(PEER_OF[name], ranks, microbatches)
        actions = len(orders[context.rank])
        times = {side: [] for side in sides}
        for _ in range(args.rounds + 1):
            for side, run in sides.items():
                if ranks > 1:
                    dist.barrier()
                wall, cpu = time.perf_counter(), time.thread_time()
                for _ in range(args.steps):
                    run()
                spent = (time.perf_counter() - wall, time.thread_time() - cpu)
                times[side].append([1e6 * s / args.steps / actions for s in spent])
        cells = [name, str(actions)]
        for kind in (0, 1):
            of_side = {side: [t[kind] for t in taken[1:]] for side, taken in times.items()}
            own = [a - b for a, b in zip(of_side["engine"], of_side["bare"])]
            for values in (of_side["engine"], of_side["bare"], own, of_side.get("torch")):
                cells.append(f"{statistics.median(values):.0f}" if values else "")
        print_once(f"| {' | '.join(cells)} |")


# Peers ------------------------------------------------------------------------------------------


ROWS: dict[str, dict[str, tuple[str, str]]] = {
    "1f1b": {"torch 1F1B": ("torch", "1f1b"), "Megatron-core": ("Megatron-core", "")},
    "gpipe": {"torch GPipe": ("torch", "gpipe")},
    "interleaved": {
        "torch Interleaved1F1B": ("torch", "interleaved"),
        "Megatron-core, interleaved": ("Megatron-core, interleaved", ""),
    },
    "zb-h1": {
        "torch InterleavedZeroBubble, one stage a rank": ("torch", "zb-1"),
        "torch InterleavedZeroBubble, two stages a rank": ("torch", "zb-2"),
    },
    "zb-v": {"torch ZBVZeroBubble": ("torch", "zb-v")},
}
"""By our schedule: the contender, and what it runs."""


Results = dict[tuple[str, str], list[Measurement]]
"""By contender and what it runs, one a round; none if its packages are missing."""


def measure_peers(
    python: Path, versions: dict[str, str], shape: Shape, args: argparse.Namespace
) -> Results:
    """Measure everyone in turn."""
    sides = {
        OURS: Side("train_megalite.py", "schedules"),
        "torch": torch_peer("schedules"),
        "Megatron-core": megatron(f"pp{args.ranks}"),
        "Megatron-core, interleaved": megatron(f"pp{args.ranks}-interleaved"),
    }
    runs = [(OURS, schedule) for schedule in ROWS]
    for row in ROWS.values():
        runs += row.values()
    results: Results = {run: [] for run in runs}
    with ExitStack() as running:
        contenders = {}
        for who, side in sides.items():
            if side.package and side.package not in versions:
                say(f"{who}: no {side.package}; `make benchmark-peers` installs it")
                continue
            interpreter = str(python if side.package else sys.executable)
            command = [interpreter, str(FOLDER / side.script), side.variant]
            contender = Contender(who, [*command, json.dumps(asdict(shape))], args.ranks)
            contenders[who] = running.enter_context(contender)
        runs = [(who, schedule) for who, schedule in runs if who in contenders]
        for who, schedule in runs:
            warmed_up(contenders[who], shape, *schedule.split())
            say(f"{who} {schedule} is ready")
        for i in range(args.rounds):
            first = i % len(runs)
            for who, schedule in runs[first:] + runs[:first]:
                taken = contenders[who].measure(args.steps, *schedule.split())
                results[who, schedule].append(taken)
                say(f"round {i + 1} | {who} {schedule}: {taken.seconds / args.steps:.3f} s")
    return results


def peers(args: argparse.Namespace) -> None:
    """Measure everyone and print the table."""
    shape = SMALL if args.small else SHAPE
    python = args.peer_python or PEER_PYTHON
    versions = installed(python)
    results = measure_peers(python, versions, shape, args)
    named = ", ".join(f"{package} {version}" for package, version in versions.items())
    print(
        f"{named}; {args.ranks} ranks, {os.cpu_count()} cores, {args.rounds} rounds of "
        f"{args.steps} steps\n"
    )
    tokens = args.steps * shape.microbatches * shape.micro_batch * shape.seq
    print("\n".join(peer_table(results, tokens)))


def peer_table(results: Results, tokens: int) -> list[str]:
    """The table's lines; `tokens` of a measurement."""
    lines = [
        "| | | tokens/s | tokens per CPU-second | ours / theirs, tokens/s | per CPU-second "
        "| this / its own 1F1B, tokens/s |",
        "|---|---|---|---|---|---|---|",
    ]
    plain = {who: results[who, "1f1b"] for who in (OURS, "torch")}
    plain["Megatron-core, interleaved"] = results["Megatron-core", ""]
    for schedule, row in ROWS.items():
        ours = results[OURS, schedule]
        for name, run in {OURS: (OURS, schedule), **row}.items():
            measured = results[run]
            if not measured:
                lines.append(f"| {schedule} | {name} | not installed | | | | |")
                continue
            ratios = ["", ""]
            if name != OURS:
                pairs = list(zip(measured, ours))
                ratios = [
                    spread([theirs.seconds / our.seconds for theirs, our in pairs]),
                    spread([theirs.cpu_seconds / our.cpu_seconds for theirs, our in pairs]),
                ]
            base = plain.get(run[0], measured)
            cells = [
                schedule,
                name,
                f"{statistics.median(tokens / m.seconds for m in measured):.0f}",
                f"{statistics.median(tokens / m.cpu_seconds for m in measured):.0f}",
                *ratios,
                spread([b.seconds / m.seconds for b, m in zip(base, measured)]),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


# Ranks ------------------------------------------------------------------------------------------


def run_rank(rank: int, meeting: str, args: argparse.Namespace) -> None:
    """What one rank of `predicted` and `overhead` does."""
    torch.set_num_threads(1)
    ranks = args.ranks
    launch = LaunchInfo(rank, ranks, rank, ranks, init_method=meeting, source="benchmark")
    layout = ParallelLayout(pipeline=ranks)
    context = ParallelContext.create(layout, launch, device=torch.device("cpu"))
    {"predicted": predicted, "overhead": overhead}[args.what](context, args)
    context.destroy()


ROUNDS = {"predicted": (5, 5), "overhead": (7, 10), "peers": (5, 2)}
"""By what is measured: rounds, and steps in each."""


def read_flags(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=ROUNDS)
    parser.add_argument("--ranks", type=int, choices=(1, 2, 4), default=2, help="(2)")
    parser.add_argument("--rounds", type=int, help="times that each is measured, in turn")
    parser.add_argument("--steps", type=int, help="in a measurement")
    parser.add_argument("--small", action="store_true", help="a small model and one round")
    parser.add_argument("--peer-python", type=Path, help=f"has their packages ({PEER_PYTHON})")
    args = parser.parse_args(words)
    if args.ranks == 1 and args.what != "overhead":
        parser.error(f"{args.what} needs --ranks 2 or more: one rank has no pipeline")
    if args.peer_python and args.what != "peers":
        parser.error(f"--peer-python has no effect with {args.what}")
    rounds, steps = (1, 2) if args.small else ROUNDS[args.what]
    args.rounds = args.rounds or rounds
    args.steps = args.steps or steps
    return args


def main() -> None:
    """Read the flags and run."""
    args = read_flags()
    if args.what == "peers":
        peers(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(run_rank, (f"file://{folder}/ranks", args), nprocs=args.ranks)


if __name__ == "__main__":
    main()
