#!/usr/bin/env python
"""Time loads of a checkpoint with --verify-checkpoint on and off, in turn.

    OMP_NUM_THREADS=1 python benchmarks/checkpoint_verification.py --folder FOLDER

One rank reads 1 GiB of fp32 tensors into tensors that exist already: from the disk, after the
kernel was asked to drop the files, and from its page cache. Each row is a median over the rounds,
with the range of the middle half; the ratio is of times of one round.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import megalite.programs.start  # noqa: F401  first: says which Python is needed

# isort: split
import argparse
import os
import statistics
import tempfile
import time

import torch

from megalite.checkpoint.format import Shard
from megalite.checkpoint.load import Checkpoint
from megalite.checkpoint.save import write
from megalite.parallel.boxes import Box
from megalite.parallel.collectives import Group

ALONE = Group((0,), 0)
SHAPE = (2048, 4096)  # 32 MiB


def shards(count: int) -> list[Shard]:
    """That many tensors of random numbers."""
    box = Box.whole(SHAPE)
    return [Shard(f"w{number}", torch.randn(SHAPE), SHAPE, box) for number in range(count)]


def forget(folder: Path) -> None:
    """Drop the files in a folder from the page cache."""
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def load(root: str, into: list[Shard], verify: bool) -> float:
    """Seconds to open the checkpoint and read it into these tensors."""
    begin = time.perf_counter()
    with Checkpoint.open(root, verify=verify) as checkpoint:
        for shard in into:
            checkpoint.read_into(shard)
    return time.perf_counter() - begin


def quartiles(values: list[float]) -> str:
    """The median and the middle half."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.3f} ({low:.3f} .. {high:.3f})"


def main() -> None:
    """Print a row for each way."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", help="where to write; default: the folder of temporary files")
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=flags.folder) as root:
        into = shards(flags.mib // 32)
        folder = write(root, 1, into, {}, {}, "", ALONE)
        for place in ("disk", "page cache"):
            times: dict[bool, list[float]] = {True: [], False: []}
            for round_ in range(flags.rounds + 1):
                # The one that comes first changes in each round; the first round is not counted.
                for verify in (True, False) if round_ % 2 else (False, True):
                    if place == "disk":
                        forget(folder)
                    seconds = load(root, into, verify)
                    if round_:
                        times[verify].append(seconds)
            ratios = [on / off for on, off in zip(times[True], times[False])]
            print(
                f"from the {place}: on {quartiles(times[True])} s, off {quartiles(times[False])} s"
            )
            print(f"  on / off {quartiles(ratios)}", flush=True)


if __name__ == "__main__":
    main()
