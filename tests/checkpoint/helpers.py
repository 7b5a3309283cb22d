"""Small checkpoints for the tests of this folder."""

import json
from collections.abc import Callable
from pathlib import Path

import torch

from megalite.checkpoint.fence import OWNER_FILE, STAGING_PREFIX
from megalite.checkpoint.folder import INDEX_FILE
from megalite.checkpoint.format import Shard
from megalite.checkpoint.save import write
from megalite.checkpoint.text_files import with_checksum
from megalite.parallel.boxes import Box, split
from megalite.parallel.collectives import Group

ALONE = Group((0,), 0)
FILE_OPERATIONS = {
    "open",
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.scandir",
    "os.listdir",
}
"""Audit events of the interpreter; os.replace is an os.rename, too."""


def whole(name: str, tensor: torch.Tensor) -> Shard:
    """All of a tensor."""
    shape = tuple(tensor.shape)
    return Shard(name, tensor, shape, Box.whole(shape))


def part(name: str, tensor: torch.Tensor, box: Box) -> Shard:
    """One box of a tensor, as a view."""
    shape = tuple(tensor.shape)
    return Shard(name, tensor[box.slices_in(Box.whole(shape))], shape, box)


def cut(shape: tuple[int, ...], dim: int, parts: int) -> list[Box]:
    """The boxes of a tensor cut into `parts` along `dim`."""
    boxes = []
    for index in range(parts):
        start, size = split(shape[dim], parts, index)
        offset = tuple(start if d == dim else 0 for d in range(len(shape)))
        boxes.append(
            Box(offset, tuple(size if d == dim else length for d, length in enumerate(shape)))
        )
    return boxes


def save(
    root: Path,
    iteration: int,
    *shards: Shard,
    state: dict | None = None,
    keep_last: int | None = None,
    keep_every: int | None = None,
    history: list[int] | None = None,
) -> Path:
    """Write a checkpoint from a single rank."""
    keep = {"keep_last": keep_last, "keep_every": keep_every, "history": history}
    return write(root, iteration, shards, {}, state or {}, "lr: 0.1\n", ALONE, **keep)


def edit_index(folder: Path, change: Callable[[dict], object]) -> None:
    """Change an index on purpose, with a checksum that fits."""
    path = folder / INDEX_FILE
    index = json.loads(path.read_text())
    index.pop("xxh3")
    change(index)
    path.write_text(with_checksum(json.dumps(index)))


def names_in(root: Path) -> list[str]:
    """Entries of a folder, hidden ones included, without those of its owner. Staging directories
    must be empty."""
    assert not list(root.glob(f"{STAGING_PREFIX}*/*"))
    return sorted(
        path.name
        for path in root.iterdir()
        if path.name != OWNER_FILE and not path.name.startswith(STAGING_PREFIX)
    )
