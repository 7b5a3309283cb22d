#!/usr/bin/env python
"""Saving and loading checkpoints, beside torch.distributed.checkpoint, safetensors and the disk.

    OMP_NUM_THREADS=1 python benchmarks/checkpoint.py --folder FOLDER     # on the disk to measure

The state is 1 GiB of fp32 tensors; of several ranks each holds the same share of each tensor. In
every round the sides take turns; times are from a barrier to the last rank's end. All write through
to the disk (fsync), after `sync` has written what others left. They load into tensors that exist,
once from the page cache and once from the disk: there, all files of the side have been dropped from
the page cache (posix_fadvise). Prints medians over the rounds, and ratios within a round with their
spread.

"raw" is one file per rank, written and read from begin to end in pieces of 16 MiB. An asynchronous
save stops the training for the copy, which is compared with a whole synchronous save.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import megalite.programs.start  # noqa: F401  first: says which Python is needed

# isort: split
import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed.checkpoint as dcp  # noqa: TID251
from safetensors import safe_open
from safetensors.torch import save_file
from torch import multiprocessing
from torch.distributed.device_mesh import init_device_mesh  # noqa: TID251
from torch.distributed.tensor import DTensor  # noqa: TID251
from torch.distributed.tensor import Shard as ShardedOver  # noqa: TID251

from megalite.checkpoint.background import AsyncSaver
from megalite.checkpoint.format import Shard
from megalite.checkpoint.load import Checkpoint
from megalite.checkpoint.save import write
from megalite.parallel.boxes import Box
from megalite.parallel.collectives import barrier
from megalite.parallel.context import ParallelContext
from megalite.parallel.launch import LaunchInfo
from megalite.parallel.layout import ParallelLayout

TENSORS = 64
COLUMNS = 4096
PIECE = 16 << 20
"""Bytes that raw reads and writes at once."""


class Side:
    """One way to save and load this rank's tensors [rows, COLUMNS] by name."""

    name = ""

    def __init__(self, context: ParallelContext, tensors: dict[str, torch.Tensor]):
        self.context = context
        self.tensors = tensors
        self.rank = context.rank

    def save(self, folder: Path) -> None:
        """Write the tensors through to the disk. Collective."""

    def load(self, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
        """Fill the tensors. Collective."""


class Megalite(Side):
    """Checkpoints of this repository."""

    name = "megalite"
    verify = True

    def shards(self, tensors: dict[str, torch.Tensor]) -> list[Shard]:
        """The tensors, as this rank's rows of those of all ranks."""
        shards = []
        for name, tensor in tensors.items():
            rows = len(tensor)
            box = Box((self.rank * rows, 0), tuple(tensor.shape))
            shape = (self.context.world_size * rows, COLUMNS)
            shards.append(Shard(name, tensor, shape, box))
        return shards

    def save(self, folder: Path) -> None:
        """Write the tensors through to the disk. Collective."""
        write(folder, 1, self.shards(self.tensors), {}, {}, "", self.context.control)

    def load(self, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
        """Fill the tensors. Collective."""
        with Checkpoint.open(folder, verify=self.verify) as checkpoint:
            for shard in self.shards(tensors):
                checkpoint.read_into(shard)


class MegaliteUnverified(Megalite):
    """The same, without comparing what is read with its checksums."""

    name = "megalite, unverified"
    verify = False


class Raw(Side):
    """As many bytes from begin to end."""

    name = "raw"

    def save(self, folder: Path) -> None:
        """Write the tensors through to the disk. Collective."""
        folder.mkdir(exist_ok=True)
        with open(folder / f"{self.rank}.bin", "wb", buffering=0) as file:
            for tensor in self.tensors.values():
                data = memoryview(tensor.view(-1).view(torch.uint8).numpy())
                for start in range(0, len(data), PIECE):
                    file.write(data[start : start + PIECE])
            os.fsync(file.fileno())

    def load(self, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
        """Fill the tensors. Collective."""
        with open(folder / f"{self.rank}.bin", "rb", buffering=0) as file:
            for tensor in tensors.values():
                data = memoryview(tensor.view(-1).view(torch.uint8).numpy())
                for start in range(0, len(data), PIECE):
                    file.readinto(data[start : start + PIECE])


class Safetensors(Side):
    """A safetensors file per rank, by the library."""

    name = "safetensors"

    def save(self, folder: Path) -> None:
        """Write the tensors through to the disk. Collective."""
        folder.mkdir(exist_ok=True)
        path = folder / f"{self.rank}.safetensors"
        save_file(self.tensors, path)
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)

    def load(self, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
        """Fill the tensors. Collective."""
        with safe_open(folder / f"{self.rank}.safetensors", framework="pt") as file:
            for name, tensor in tensors.items():
                tensor.copy_(file.get_tensor(name))


class Dcp(Side):
    """torch.distributed.checkpoint with its file system writer, which calls fsync."""

    name = "torch.distributed.checkpoint"

    def state(self, tensors: dict[str, torch.Tensor]) -> dict:
        """The tensors, sharded by rows over the ranks."""
        if self.context.world_size == 1:
            return dict(tensors)
        mesh = init_device_mesh("cpu", (self.context.world_size,))
        rows = [ShardedOver(0)]
        return {
            name: DTensor.from_local(tensor, mesh, rows, run_check=False)
            for name, tensor in tensors.items()
        }

    def save(self, folder: Path) -> None:
        """Write the tensors through to the disk. Collective."""
        alone = self.context.world_size == 1
        dcp.save(self.state(self.tensors), checkpoint_id=folder, no_dist=alone)

    def load(self, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
        """Fill the tensors. Collective."""
        alone = self.context.world_size == 1
        dcp.load(self.state(tensors), checkpoint_id=folder, no_dist=alone)


SIDES = (Raw, Megalite, MegaliteUnverified, Safetensors, Dcp)


def drop_from_page_cache(folder: Path) -> None:
    """The next read of these files, which are on the disk, comes from there."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


class Rounds:
    """Times of what the ranks do together."""

    def __init__(self, context: ParallelContext, folder: Path):
        self.context = context
        self.folder = folder
        self.times: dict[tuple[str, str], list[float]] = {}
        self.rounds = 0

    def time(self, side: str, what: str, action: Callable[[], object]) -> None:
        """Time an action of all ranks; what was changed before is on the disk first."""
        if self.context.rank == 0:
            os.sync()
        barrier(self.context.control)
        began = time.perf_counter()
        action()
        barrier(self.context.control)
        self.times.setdefault((side, what), []).append(time.perf_counter() - began)

    def once(self, action: Callable[[], object]) -> None:
        """Something that rank 0 does for all."""
        barrier(self.context.control)
        if self.context.rank == 0:
            action()
        barrier(self.context.control)

    def run(self, sides: list[Side], targets: dict[str, torch.Tensor]) -> None:
        """One round: each side saves, loads from the page cache, and from the disk. Another side
        begins in each round."""
        first = self.rounds % len(sides)
        self.rounds += 1
        for side in [*sides[first:], *sides[:first]]:
            folder = self.folder / side.name.replace(" ", "-")
            self.time(side.name, "save", partial(side.save, folder))
            self.time(side.name, "load, cached", partial(side.load, folder, targets))
            for name, target in targets.items():
                if not torch.equal(target, side.tensors[name]):
                    raise SystemExit(f"{side.name}: {name} is not what was saved")
                target.zero_()
            self.once(partial(drop_from_page_cache, folder))
            self.time(side.name, "load", partial(side.load, folder, targets))
            self.once(partial(shutil.rmtree, folder))

    def run_async(self, side: Megalite, saver: AsyncSaver) -> None:
        """An asynchronous save, and how long it blocks."""
        folder = self.folder / "async"
        save = partial(write, folder, 1, state={}, config_yaml="", world=self.context.saving)

        def start() -> None:
            saver.start(1, side.shards(side.tensors), {}, save)

        self.time(side.name, "blocked", start)
        self.time(side.name, "async", saver.finish)
        self.once(partial(shutil.rmtree, folder))


def measure(rank: int, ranks: int, options: argparse.Namespace, meeting: str) -> None:
    """What one rank does; rank 0 prints."""
    torch.set_num_threads(options.threads)
    launch = LaunchInfo(rank, ranks, rank, ranks, init_method=meeting, source="benchmark")
    layout = ParallelLayout.for_world(ranks)
    context = ParallelContext.create(layout, launch, saves_in_thread=True)
    rows = options.mib * 2**20 // TENSORS // 4 // COLUMNS // ranks
    generator = torch.Generator().manual_seed(rank)
    tensors = {}
    for number in range(TENSORS):
        tensors[f"layers.{number}.weight"] = torch.randn(rows, COLUMNS, generator=generator)
    targets = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    sides = [side(context, tensors) for side in SIDES]
    rounds = Rounds(context, Path(options.folder))
    saver = AsyncSaver()
    saver.reserve(sides[1].shards(tensors), {})
    for number in range(options.rounds + 1):
        rounds.run(sides, targets)
        rounds.run_async(sides[1], saver)
        if number == 0:
            rounds.times.clear()  # of the first round, which warms up
    if rank == 0:
        report(rounds.times, ranks, options.mib)
    context.destroy()


def spread(numerators: list[float], denominators: list[float]) -> str:
    """Median, least and most of the ratios within a round."""
    ratios = [one / other for one, other in zip(numerators, denominators)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} .. {max(ratios):.2f})"


def report(times: dict[tuple[str, str], list[float]], ranks: int, mib: int) -> None:
    """Print the table."""
    kinds = ("save", "load", "load, cached")
    titles = " | ".join(f"{kind}, MiB/s | of raw" for kind in kinds)
    print(f"\n| {mib} MiB, {ranks} rank(s) | {titles} |")
    print(f"|{'---|' * 7}")
    for side in SIDES:
        cells = []
        for kind in kinds:
            own = times[side.name, kind]
            cells.append(f"{mib / statistics.median(own):.0f}")
            cells.append(spread(times["raw", kind], own))
        print(f"| {side.name} | {' | '.join(cells)} |")
    blocked = times["megalite", "blocked"]
    seconds = statistics.median(blocked)
    share = spread(blocked, times["megalite", "save"])
    print(f"\nAn asynchronous save stops the training for {seconds:.2f} s: {share} of a save.")
    sys.stdout.flush()


def main() -> None:
    """Read the flags, start the ranks and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", default=".", help="where to write, on the disk to measure")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--mib", type=int, default=1024, help="size of the state")
    parser.add_argument("--rounds", type=int, default=5, help="times that each side is measured")
    copies = "threads of torch on each rank, which share the copy of an asynchronous save"
    parser.add_argument("--threads", type=int, default=1, help=copies)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="checkpoints-") as folder:
        options.folder = folder
        for ranks in options.ranks:
            meeting = f"file://{folder}/ranks-{ranks}"
            multiprocessing.spawn(measure, (ranks, options, meeting), nprocs=ranks)


if __name__ == "__main__":
    main()
