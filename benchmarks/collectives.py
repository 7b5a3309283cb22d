#!/usr/bin/env python
"""Sums over ranks on gloo: megalite's way and gloo's own, in turn.

    OMP_NUM_THREADS=1 python benchmarks/collectives.py              # 2 ranks
    OMP_NUM_THREADS=1 python benchmarks/collectives.py --ranks 4

All-reduce and reduce-scatter of fp32 tensors of several sizes. Prints the median time of each side
on rank 0, and the ratio gloo / megalite within a round with its spread.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import megalite.programs.start  # noqa: F401  first: says which Python is needed

# isort: split
import argparse
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
import torch.distributed as dist  # noqa: TID251 - its own calls are what is compared
from torch import multiprocessing

from megalite.parallel.collectives import all_reduce, reduce_scatter
from megalite.parallel.context import ParallelContext
from megalite.parallel.launch import LaunchInfo
from megalite.parallel.layout import ParallelLayout

SIZES = (2**14, 2**16, 2**18, 2**19, 2**20, 2**22)
"""Elements: 64 KiB to 16 MiB."""
CALLS = 5
"""Calls that are timed together."""


def seconds(call: Callable[[], object]) -> float:
    """Of one call, when all ranks begin together."""
    dist.barrier()
    began = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - began) / CALLS


def measure(rank: int, ranks: int, rounds: int, meeting: str) -> None:
    """What one rank does; rank 0 prints."""
    torch.set_num_threads(1)
    launch = LaunchInfo(rank, ranks, rank, ranks, init_method=meeting, source="benchmark")
    layout = ParallelLayout.for_world(ranks)
    context = ParallelContext.create(layout, launch, device=torch.device("cpu"))
    group = context.data
    for elements in SIZES:
        tensor = torch.randn(elements)
        out = torch.empty(elements // ranks)
        kinds = {
            "all-reduce": (
                lambda t=tensor: dist.all_reduce(t, group=group.handle),
                lambda t=tensor: all_reduce(t, group),
            ),
            "reduce-scatter": (
                lambda t=tensor, o=out: dist.reduce_scatter_tensor(o, t, group=group.handle),
                lambda t=tensor: reduce_scatter(t, group),
            ),
        }
        for kind, sides in kinds.items():
            times = [[seconds(side) for side in sides] for _ in range(rounds + 1)][1:]
            tensor.normal_()  # sums of sums would grow without end
            ratios = [gloo / ours for gloo, ours in times]
            gloo, ours = (1000 * statistics.median(side) for side in zip(*times))
            middle, least, most = statistics.median(ratios), min(ratios), max(ratios)
            if rank == 0:
                size = f"{elements * 4 / 2**20:g} MiB"
                spread = f"{middle:.2f} ({least:.2f} .. {most:.2f})"
                print(f"| {kind} | {size} | {gloo:.2f} | {ours:.2f} | {spread} |", flush=True)
    context.destroy()


def main() -> None:
    """Read the flags, start the ranks and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15, help="times that each side is measured")
    args = parser.parse_args()
    print(f"| {args.ranks} ranks | | gloo, ms | megalite, ms | gloo / megalite |")
    print("|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"file://{folder}/ranks"
        multiprocessing.spawn(measure, (args.ranks, args.rounds, meeting), nprocs=args.ranks)


if __name__ == "__main__":
    main()
