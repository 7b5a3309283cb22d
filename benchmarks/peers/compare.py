"""megalite and its peers in turn, each layout a row of the table: `training.py --peers`.

All contenders of a row are alive at once, one process a rank, and take turns: a round measures
each of them once, seconds apart, while the others sleep.
"""

import json
import math
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

from matmul import FLOPS as MATMUL_FLOPS
from rank import Shape

FOLDER = Path(__file__).parent
PEER_PYTHON = FOLDER / ".venv" / "bin" / "python"
OURS = "megalite"
PEAK = "matrix products"
MATMULS = 50
"""Products in a measurement of the peak."""


class Side(NamedTuple):
    """What one contender runs."""

    script: str
    variant: str
    package: str = ""
    """What the peers' Python must have; "": it runs in this Python."""


def torch_peer(variant: str) -> Side:
    """What PyTorch itself has."""
    return Side("train_torch.py", variant, package="torch")


def megatron(variant: str) -> Side:
    """Megatron-core in a layout."""
    return Side("train_megatron.py", variant, package="megatron-core")


HUGGING_FACE = Side("train_torch.py", "transformers", package="transformers")
DEEPSPEED = Side("train_deepspeed.py", "dp2", package="deepspeed")


@dataclass(frozen=True)
class Row:
    """A layout, and who is compared in it."""

    ranks: int
    peers: dict[str, Side]
    """By name."""
    data_parallel: int = 1
    microbatches: int = 1
    steps: int = 3
    """In a measurement."""


ROWS = {
    "single": Row(
        1,
        {
            "plain PyTorch": torch_peer("single"),
            "Hugging Face GPT-2": HUGGING_FACE,
            "Megatron-core": megatron("single"),
        },
    ),
    "dp2": Row(
        2, {"torch DDP": torch_peer("dp2"), "Megatron-core": megatron("dp2")}, data_parallel=2
    ),
    "dp2-zero1": Row(
        2,
        {
            "DeepSpeed ZeRO-1": DEEPSPEED,
            "Megatron-core, distributed optimizer": megatron("dp2-zero1"),
        },
        data_parallel=2,
    ),
    "tp2": Row(2, {"DTensor": torch_peer("tp2"), "Megatron-core": megatron("tp2")}, steps=4),
    "tp2-sp": Row(
        2, {"DTensor": torch_peer("tp2-sp"), "Megatron-core": megatron("tp2-sp")}, steps=4
    ),
    "pp2": Row(
        2,
        {"torch 1F1B": torch_peer("pp2"), "Megatron-core": megatron("pp2")},
        microbatches=8,
        steps=1,
    ),
    "tp2pp2dp2": Row(
        8, {"Megatron-core": megatron("tp2pp2dp2")}, data_parallel=2, microbatches=8, steps=1
    ),
}


@dataclass(frozen=True)
class Measurement:
    """A few steps of one contender, over all its ranks."""

    seconds: float
    """From the first rank's begin to the last one's end."""
    cpu_seconds: float
    """Sum over ranks."""
    steps_per_second: float
    """Sum over ranks, each by its own time."""
    rss_mib: float
    """Peak resident memory so far, of the rank with the highest."""
    loss: float | None
    """Of the last step, mean over the ranks that know it."""


class ContenderFailed(Exception):
    """A rank ended before it had answered; the message has the end of what it printed."""


class Contender:
    """The processes of one side, started and waiting for their turn. Use it in a `with`."""

    def __init__(self, name: str, command: Sequence[str], ranks: int):
        self.name = name
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = os.environ | {
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "LOCAL_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
            "HF_HUB_OFFLINE": "1",
            # What DeepSpeed compiles stays beside the packages.
            "TORCH_EXTENSIONS_DIR": str(Path(command[0]).parents[1] / "torch_extensions"),
            "PATH": f"{Path(command[0]).parent}{os.pathsep}{os.environ['PATH']}",
        }
        self.logs = [tempfile.TemporaryFile("w+") for _ in range(ranks)]
        self.processes = [
            subprocess.Popen(
                command,
                env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
            for rank, log in enumerate(self.logs)
        ]

    def __enter__(self):
        return self

    def __exit__(self, *failure):
        for process in self.processes:
            process.kill()
            process.communicate()
        for log in self.logs:
            log.close()

    def measure(self, steps: int, *which: str) -> Measurement:
        """Run this many training steps; `which` is what the step function is called with."""
        for process in self.processes:
            try:
                process.stdin.write(f"{' '.join([str(steps), *which])}\n")
                process.stdin.flush()
            except BrokenPipeError:
                pass  # it has ended: said below, with the reason
        answers = []
        for process, log in zip(self.processes, self.logs):
            line = process.stdout.readline()
            if not line:
                log.seek(0)
                raise ContenderFailed(f"{self.name} failed:\n{log.read()[-3000:]}")
            answers.append(json.loads(line))
        losses = [answer["loss"] for answer in answers if answer["loss"] is not None]
        return Measurement(
            seconds=max(a["ended"] for a in answers) - min(a["began"] for a in answers),
            cpu_seconds=sum(a["cpu_seconds"] for a in answers),
            steps_per_second=sum(steps / (a["ended"] - a["began"]) for a in answers),
            rss_mib=max(a["rss_mib"] for a in answers),
            loss=statistics.mean(losses) if losses else None,
        )


def installed(python: Path) -> dict[str, str]:
    """Versions of the peers' packages in an environment. Raises SystemExit if it has no Python."""
    names = sorted({side.package for row in ROWS.values() for side in row.peers.values()})
    code = (
        "import importlib.metadata as m, json, sys; "
        "found = {d.metadata['Name']: d.version for d in m.distributions()}; "
        "print(json.dumps({n: found[n] for n in sys.argv[1:] if n in found}))"
    )
    try:
        done = subprocess.run([python, "-c", code, *names], capture_output=True, check=True)
    except OSError as error:
        raise SystemExit(
            f"the peers' Python cannot be started: {error}. `make benchmark-peers` makes their "
            "environment, in benchmarks/peers/.venv; --peer-python names another one."
        ) from None
    return json.loads(done.stdout)


def warmed_up(contender: Contender, shape: Shape, *which: str) -> Contender:
    """The contender after two steps, whose losses must be those of random weights."""
    expected = math.log(shape.vocab) + 0.02**2 * shape.hidden / 2
    for _ in range(2):
        loss = contender.measure(1, *which).loss
        if loss is not None and abs(loss - expected) > 0.15:
            raise ContenderFailed(f"{contender.name}: first losses {loss:.3f}, not {expected:.3f}")
    return contender


def run_row(
    name: str, python: Path, versions: dict[str, str], shape: Shape, rounds: int
) -> dict[str, list[Measurement]]:
    """Measurements of each contender of a row, one a round; none if its packages are missing."""
    row = ROWS[name]
    argument = json.dumps(asdict(replace(shape, microbatches=row.microbatches)))
    ours = Side("train_megalite.py", name)
    sides = {OURS: ours} | row.peers | {PEAK: Side("matmul.py", name)}
    results = {who: [] for who in sides}
    with ExitStack() as running:
        contenders = []
        for who, side in sides.items():
            if side.package and side.package not in versions:
                say(f"{name} | {who}: no {side.package}; `make benchmark-peers` installs it")
                continue
            interpreter = str(python if side.package else sys.executable)
            command = [interpreter, str(FOLDER / side.script), side.variant, argument]
            contender = running.enter_context(Contender(who, command, row.ranks))
            contenders.append(warmed_up(contender, shape))
            say(f"{name} | {who} is ready")
        for i in range(rounds):
            first = i % len(contenders)
            for contender in contenders[first:] + contenders[:first]:
                steps = MATMULS if contender.name == PEAK else row.steps
                taken = contender.measure(steps)
                results[contender.name].append(taken)
                say(f"{name} | round {i + 1} | {contender.name}: {taken.seconds / steps:.3f} s")
    return results


def say(line: str) -> None:
    """Progress, apart from the table."""
    print(line, file=sys.stderr, flush=True)


def spread(values: Sequence[float]) -> str:
    """Median (least .. most)."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} .. {max(values):.2f})"


def lines_of(name: str, shape: Shape, results: dict, sequence_flops: float) -> list[str]:
    """The table's lines of a row."""
    row = ROWS[name]
    sequences = shape.micro_batch * row.microbatches * row.data_parallel * row.steps
    tokens = sequences * shape.seq
    # Of all ranks together, each by its own time: waiting for the last one is no part of a peak.
    peaks = [MATMUL_FLOPS * m.steps_per_second for m in results[PEAK]]
    ours = results[OURS]
    lines = []
    for who, measured in results.items():
        if who == PEAK:
            continue
        if not measured:
            lines.append(f"| {name} | {who} | not installed | | | | | | |")
            continue
        shares = [sequences * sequence_flops / m.seconds / p for m, p in zip(measured, peaks)]
        cells = [
            name,
            who,
            f"{statistics.median(tokens / m.seconds for m in measured):.0f}",
            f"{statistics.median(tokens / m.cpu_seconds for m in measured):.0f}",
            f"{measured[-1].rss_mib:.0f}",
            f"{statistics.median(shares):.0%}",
        ]
        if who == OURS:
            cells += ["", "", ""]
        else:
            cells += [
                spread([theirs.seconds / our.seconds for our, theirs in zip(ours, measured)]),
                spread([t.cpu_seconds / our.cpu_seconds for our, t in zip(ours, measured)]),
                f"{ours[-1].rss_mib / measured[-1].rss_mib:.2f}",
            ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def compare_with_peers(
    rows: Sequence[str], rounds: int, python: Path, shape: Shape, sequence_flops: float
) -> None:
    """Measure the rows and print the table, in Markdown.

    Args:
        rows: names in ROWS.
        rounds: measurements of each contender of a row, in turn.
        python: the interpreter that has the peers' packages.
        shape: of the model and the microbatch.
        sequence_flops: FLOPs of a training sequence.
    """
    versions = installed(python)
    lines = []
    for name in rows:
        results = run_row(name, python, versions, shape, rounds)
        lines += lines_of(name, shape, results, sequence_flops)
    named = ", ".join(f"{package} {version}" for package, version in versions.items())
    print(f"{named}; {rounds} rounds; {os.cpu_count()} cores\n")
    print(
        "| | | tokens/s | tokens per CPU-second | peak RSS, MiB | share of GEMM peak "
        "| ours / theirs, tokens/s | per CPU-second | peak RSS |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    print("\n".join(lines))
