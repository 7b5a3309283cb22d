#!/usr/bin/env python
"""Tokens per second of megalite and of others that train a model of the same shape, in turn.

    OMP_NUM_THREADS=1 python benchmarks/training.py         # plain PyTorch, in one process
    python benchmarks/training.py --peers                   # every peer, in every layout
    python benchmarks/training.py --profile tp2             # profile ranks of a layout

Shape: GPT of 8 layers, hidden 512, 8 heads, sequence 256, vocabulary 8192, untied, microbatch 4,
fp32, AdamW.

In one process, both sides start from the same weights and see the same tokens; their losses are
compared before their times are. A step is one microbatch forward and backward, gradient clipping
(both or, with --no-clip, neither) and the optimizer.

--peers compares with plain PyTorch, Hugging Face's GPT-2, torch DDP, DTensor, torch's pipelining,
DeepSpeed and Megatron-core, without clipping, one thread a rank; `make benchmark-peers` installs
them. It prints a table in Markdown: medians, and ratios within a round (least .. most).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "peers"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import megalite.programs.start  # noqa: F401  first: says which Python is needed

# isort: split
import argparse
import os
import statistics
import time
from dataclasses import replace

import torch
from compare import PEER_PYTHON, ROWS, compare_with_peers
from plain_gpt import cross_entropy, plain_gpt
from rank import Shape
from torch import nn
from train_megalite import layout_config, our_step

from megalite.config.run import RunConfig
from megalite.data.mock import MockDataset
from megalite.models.cost import flops_per_sequence
from megalite.parallel.context import ParallelContext
from megalite.parallel.launch import detect
from megalite.training.build import build_context


def copy_weights(plain: nn.Module, ours: dict[str, torch.Tensor]) -> None:
    """Give the plain model our weights."""
    names = {
        "embedding.words": "embedding.word_embeddings",
        "embedding.positions": "embedding.position_embeddings",
        "head.norm": "final_norm",
        "head.output": "output",
    }
    parts = {
        "norm1": "attention_norm",
        "norm2": "mlp_norm",
        "attention.qkv": "attention.qkv",
        "attention.output": "attention.output",
        "up": "mlp.up",
        "down": "mlp.down",
    }
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            module, kind = name.rsplit(".", 1)
            if module in names:
                source = names[module]
            else:
                block, part = module.split(".", 1)
                source = f"layers.{block.removeprefix('block')}.{parts[part]}"
            parameter.copy_(ours[f"{source}.{kind}"].view(parameter.shape))


def plain_step(config: RunConfig, shape: Shape, weights: dict[str, torch.Tensor], fused: bool):
    """Step function of the plain model, with torch's default AdamW or its fused one."""
    model = plain_gpt(shape, dropout=config.model.hidden_dropout)
    copy_weights(model, weights)
    o = config.optimizer
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=o.lr, weight_decay=o.weight_decay, fused=fused or None
    )
    dataset = MockDataset(config.model.vocab_size, config.model.seq_length, 1, "train")
    b = config.data.micro_batch_size
    taken = 0

    def step() -> float:
        nonlocal taken
        rows = torch.stack([torch.from_numpy(dataset[taken * b + j]) for j in range(b)])
        taken += 1
        optimizer.zero_grad()
        loss = cross_entropy(model(rows[:, :-1].contiguous()), rows[:, 1:].contiguous())
        loss.backward()
        if o.clip_grad:
            torch.nn.utils.clip_grad_norm_(model.parameters(), o.clip_grad)
        optimizer.step()
        return loss.item()

    return step


def compare_with_plain(config: RunConfig, shape: Shape, rounds: int, steps: int) -> None:
    """Time the sides in turn, `rounds` times `steps` steps each; print medians and ratios (above 1:
    ours is faster).

    CPU time beside wall time, since other work on the machine stretches the latter.
    """
    context = ParallelContext.single()
    ours, model = our_step(config, context)
    weights = {name: p.detach().clone() for name, p in model.parameters_by_name.items()}
    sides = {
        "megalite": ours,
        "plain, AdamW": plain_step(config, shape, weights, fused=False),
        "plain, fused AdamW": plain_step(config, shape, weights, fused=True),
    }
    first = {name: step() for name, step in sides.items()}
    allowed = 1e-4 if config.model.hidden_dropout == 0 else 0.1  # each side drops other elements
    assert max(first.values()) - min(first.values()) < allowed, (
        f"the sides compute different losses: {first}"
    )
    seconds = {name: [] for name in sides}
    for _ in range(rounds):
        for name, step in sides.items():
            wall = time.perf_counter()
            cpu = time.process_time()
            for _ in range(steps):
                step()
            seconds[name].append(
                ((time.perf_counter() - wall) / steps, (time.process_time() - cpu) / steps)
            )
    tokens = config.data.micro_batch_size * config.model.seq_length
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), "
        f"{rounds} rounds of {steps} steps"
    )
    for name, times in seconds.items():
        walls = [wall for wall, _ in times]
        rate = tokens / statistics.median(walls)
        line = f"{name:20} {rate:6.0f} tokens/s | first loss {first[name]:.5f}"
        if name != "megalite":
            for kind, which in (("wall", 0), ("CPU", 1)):
                ratios = [
                    theirs[which] / ours[which] for theirs, ours in zip(times, seconds["megalite"])
                ]
                spread = f"[{min(ratios):.3f} .. {max(ratios):.3f}]"
                line += f" | its {kind} time / ours {statistics.median(ratios):.3f} {spread}"
        print(line)


def profile(layout: str, shape: Shape) -> None:
    """Run a few steps of a layout under torch's profiler in this rank and print where the time goes
    (rank 0)."""
    launch = detect(os.environ)
    shape = replace(shape, microbatches=ROWS[layout].microbatches)
    config = layout_config(layout, shape, launch.world_size)
    context, _ = build_context(config, launch)
    step, _ = our_step(config, context)
    step()
    tokens = config.data.global_batch_size * config.model.seq_length
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        step()
        times.append(time.perf_counter() - begin)
    with torch.profiler.profile() as trace:
        step()
    if context.rank == 0:
        print(f"{layout}: {tokens / statistics.median(times):.0f} tokens/s")
        print(
            trace.key_averages().table(
                sort_by="self_cpu_time_total", row_limit=14, max_name_column_width=48
            )
        )
    context.destroy()


MODES = {
    "with --profile": {"profile", "layers"},
    "with --peers": {"peers", "layers", "rounds", "rows", "peer_python"},
    "without --peers": {"layers", "rounds", "steps", "no_clip", "dropout"},
}
"""The flags that each kind of run reads."""


def read_flags() -> argparse.Namespace:
    """The command line, in which every flag has an effect. None: not given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, help="measurements of each side (7; with --peers 5)")
    parser.add_argument("--layers", type=int, help="of the model (8); fewer to try the script")
    alone = parser.add_argument_group("with plain PyTorch, in one process")
    alone.add_argument("--steps", type=int, help="in a measurement (2)")
    alone.add_argument("--no-clip", action="store_true", help="no gradient clipping on any side")
    alone.add_argument("--dropout", type=float, help="on all sides (0)")
    peers = parser.add_argument_group("with every peer")
    peers.add_argument("--peers", action="store_true", help="compare with every peer")
    peers.add_argument("--rows", help=f"default: {','.join(ROWS)}")
    peers.add_argument("--peer-python", type=Path, help=f"has their packages ({PEER_PYTHON})")
    parser.add_argument("--profile", choices=ROWS, help="profile the ranks of this layout")
    args = parser.parse_args()
    mode = "with --peers" if args.peers else "without --peers"
    if args.profile:
        mode = "with --profile"
    for name, value in vars(args).items():
        if value is not None and value is not False and name not in MODES[mode]:
            parser.error(f"--{name.replace('_', '-')} has no effect {mode}")
    args.rows = args.rows.split(",") if args.rows else list(ROWS)
    if unknown := set(args.rows) - set(ROWS):
        parser.error(f"--rows: no {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    return args


def main() -> None:
    """Read the flags and run."""
    args = read_flags()
    shape = Shape(layers=args.layers or 8)
    if args.profile:
        ranks = ROWS[args.profile].ranks
        if ranks > 1 and "RANK" not in os.environ:
            run = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            os.execvpe(sys.executable, [sys.executable, *run, *sys.argv], environment)
        torch.set_num_threads(1)
        profile(args.profile, shape)
        return
    clip = 0.0 if args.no_clip else 1.0
    dropout = args.dropout or 0.0
    config = layout_config("single", shape, world_size=1, clip_grad=clip, dropout=dropout)
    if args.peers:
        python = args.peer_python or PEER_PYTHON
        flops = flops_per_sequence(config.model)
        compare_with_peers(args.rows, args.rounds or 5, python, shape, flops)
        return
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    compare_with_plain(config, shape, args.rounds or 7, args.steps or 2)


if __name__ == "__main__":
    main()
