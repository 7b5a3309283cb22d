#!/usr/bin/env python
"""Time layout-independent dropout and torch's own dropout, in turn.

    OMP_NUM_THREADS=1 python benchmarks/dropout.py   # the operator, then whole steps
    OMP_NUM_THREADS=1 python benchmarks/dropout.py --only operator

Operator: forward and backward of residual + dropout(x + bias) at a hidden shape, and of dropout
alone at an attention shape, fp32. Step: the GPT of benchmarks/training.py without dropout, and with
0.1 everywhere under either scheme.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import megalite.programs.start  # noqa: F401  first: says which Python is needed

# isort: split
import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.training import Shape, layout_config, our_step
from megalite.config.run import with_values
from megalite.kernels.dropout import bias_dropout_add
from megalite.kernels.philox import key_of
from megalite.parallel.context import ParallelContext

P = 0.1
KEY = key_of(1234, "dropout")


def in_turn(sides: dict[str, Callable[[], object]], rounds: int, repeat: int) -> None:
    """Time the sides in turn; print a row of Markdown for each: median wall time, and median ratios
    to the first side.

    Ratios are of one round's times, which lie side by side; CPU time beside wall time, since other
    work on the machine stretches the latter.
    """
    times = {name: [] for name in sides}
    for run in sides.values():
        run()
    for _ in range(rounds):
        for name, run in sides.items():
            wall = time.perf_counter()
            cpu = time.process_time()
            for _ in range(repeat):
                run()
            times[name].append(
                ((time.perf_counter() - wall) / repeat, (time.process_time() - cpu) / repeat)
            )
    first = next(iter(times.values()))
    for name, own in times.items():
        ratios = [sorted(t[i] / f[i] for t, f in zip(own, first)) for i in (0, 1)]
        shown = " | ".join(
            f"{statistics.median(r):.2f} ({r[0]:.2f} .. {r[-1]:.2f})" for r in ratios
        )
        print(
            f"| {name} | {1000 * statistics.median(wall for wall, _ in own):.1f} | {shown} |",
            flush=True,
        )


def hidden(rounds: int) -> None:
    """[s, b, h] = [256, 4, 512]: bias, dropout and residual."""
    x, residual, gradient = (torch.randn(256, 4, 512) for _ in range(3))
    leaves = [x.requires_grad_(), torch.randn(512, requires_grad=True), residual.requires_grad_()]
    rows = torch.arange(256)[:, None]
    samples = torch.arange(4)

    def ours():
        torch.autograd.grad(bias_dropout_add(*leaves, rows, samples, 1, *KEY, P), leaves, gradient)

    def plain():
        x, bias, residual = leaves
        torch.autograd.grad(residual + torch.nn.functional.dropout(x + bias, P), leaves, gradient)

    in_turn({"hidden [256, 4, 512]: torch": plain, "hidden [256, 4, 512]: global": ours}, rounds, 5)


def attention(rounds: int) -> None:
    """[b, n, s, s] = [4, 8, 256, 256]: dropout alone."""
    x = torch.randn(4, 8, 256, 256, requires_grad=True)
    gradient = torch.randn(4, 8, 256, 256)
    rows = torch.arange(8 * 256).view(8, 256)
    samples = torch.arange(4)[:, None, None]

    def ours():
        torch.autograd.grad(bias_dropout_add(x, None, None, rows, samples, 0, *KEY, P), x, gradient)

    def plain():
        torch.autograd.grad(torch.nn.functional.dropout(x, P), x, gradient)

    in_turn(
        {"attention [4, 8, 256, 256]: torch": plain, "attention [4, 8, 256, 256]: global": ours},
        rounds,
        2,
    )


def steps(rounds: int, layers: int) -> None:
    """Whole training steps."""
    dropout = {"attention_dropout": P, "hidden_dropout": P}
    sides = {
        "step: no dropout": {},
        "step: hidden dropout, megatron": {"hidden_dropout": P, "rng_scheme": "megatron"},
        "step: hidden dropout, global": {"hidden_dropout": P, "rng_scheme": "global"},
        "step: both, megatron": {**dropout, "rng_scheme": "megatron"},
        "step: both, global": {**dropout, "rng_scheme": "global"},
    }
    context = ParallelContext.single()
    config = layout_config("single", Shape(layers=layers), world_size=1, clip_grad=1.0)
    steps = {}
    for name, flags in sides.items():
        steps[name], _ = our_step(with_values(config, flags), context)
    in_turn(steps, rounds, repeat=1)


def main() -> None:
    """Read the flags and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=["operator", "step"], help="only a part")
    parser.add_argument("--rounds", type=int, default=7, help="times that each side is measured")
    parser.add_argument("--layers", type=int, default=8, help="a smaller model, to try the script")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), {args.rounds} rounds\n")
    print("| | ms, median | wall time / first row's | CPU time / first row's |\n|---|---|---|---|")
    if args.only != "step":
        hidden(args.rounds)
        attention(args.rounds)
    if args.only != "operator":
        steps(args.rounds, args.layers)


if __name__ == "__main__":
    main()
