"""What a checkpoint is on disk: names of folders and files, the index, and the checks that make an index trustworthy.

The specification for users is docs/checkpoints.md. Nothing here communicates.
"""

import hashlib
import itertools
import json
import os
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megalite.checkpoint.folder import INDEX_FILE, CheckpointError
from megalite.parallel.boxes import Box

FORMAT_VERSION = 1
CONFIG_FILE = "config.yaml"

SHOWN_PROBLEMS = 20
PRIVATE_PREFIX = "@"
"""Keys that begin with it are a rank's own tensors, parts of nothing."""

SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in SAFETENSORS_DTYPES}


def listing(heading: str, problems: Sequence[str], total: int | None = None) -> str:
    """A message of one line per problem, the first 20 of them; `total` when `problems` is not all of them."""
    shown = problems[:SHOWN_PROBLEMS]
    unshown = (total or len(problems)) - len(shown)
    return "\n  ".join([heading, *shown, *([f"and {unshown} more"] if unshown else [])])


@dataclass(frozen=True)
class Shard:
    """A rank's part of a global tensor. `tensor` may be any view of shape `box.shape`; an empty box holds nothing.

    Raises ValueError when tensor, box and global shape do not fit together.
    """

    name: str
    """Global name, the same in every layout: `layers.0.mlp.up.weight`. No `@`, which marks keys inside the files."""
    tensor: torch.Tensor
    global_shape: tuple[int, ...]
    box: Box

    def __post_init__(self):
        if not self.name or PRIVATE_PREFIX in self.name:
            raise ValueError(f"a piece needs a name without {PRIVATE_PREFIX!r}; got {self.name!r}")
        if tuple(self.tensor.shape) != tuple(self.box.shape):
            raise ValueError(
                f"{self.name}: the tensor has shape {tuple(self.tensor.shape)}, its box {self.box.shape}"
            )
        if not lies_within(self.box, self.global_shape):
            raise ValueError(
                f"{self.name}: {self.box} does not lie in the global shape {self.global_shape}"
            )


def lies_within(box: Box, shape: Sequence[int]) -> bool:
    """Whether `box` is a part of a tensor of this shape (same number of dims, no element outside)."""
    return len(box.offset) == len(box.shape) == len(shape) and all(
        0 <= start and 0 <= size and start + size <= length
        for start, size, length in zip(box.offset, box.shape, shape)
    )


@dataclass(frozen=True)
class StoredBox:
    """Where one box of a tensor lies: under `key` in `file`."""

    file: str
    key: str
    box: Box


@dataclass(frozen=True)
class StoredTensor:
    """A global tensor and the boxes it is stored in."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    boxes: tuple[StoredBox, ...]

    def problems(self, name: str) -> list[str]:
        """Why the boxes are not exactly the tensor: one outside, two that overlap, elements that none covers."""
        outside = [part for part in self.boxes if not lies_within(part.box, self.shape)]
        if outside:
            return [
                f"{name}: {part.box} in {part.file} lies outside the shape {self.shape}"
                for part in outside
            ]
        overlapping = [
            f"{name}: {one.box} in {one.file} and {other.box} in {other.file} overlap"
            for one, other in itertools.combinations(self.boxes, 2)
            if one.box.intersect(other.box)
        ]
        covered, wanted = sum(part.box.numel for part in self.boxes), Box.whole(self.shape).numel
        if not overlapping and covered != wanted:
            return [
                f"{name}: only {covered} of the {wanted} elements of shape {self.shape} are covered"
            ]
        return overlapping


@dataclass(frozen=True)
class StoredFile:
    """Size in bytes and SHA-256 of a file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Index:
    """The content of index.json: every tensor's boxes, and every other file's size and checksum."""

    iteration: int
    world_size: int
    tensors: dict[str, StoredTensor]
    files: dict[str, StoredFile]

    def to_json(self) -> str:
        """The text of index.json."""
        tensors = {name: _tensor_to_dict(tensor) for name, tensor in self.tensors.items()}
        files = {
            name: {"bytes": file.bytes, "sha256": file.sha256} for name, file in self.files.items()
        }
        header = {
            "format_version": FORMAT_VERSION,
            "iteration": self.iteration,
            "world_size": self.world_size,
        }
        return json.dumps({**header, "files": files, "names": tensors})

    @classmethod
    def from_json(cls, text: str) -> "Index":
        """Parse index.json. Raises CheckpointError on another format version, or when it is damaged or unsafe."""
        try:
            raw = json.loads(text)
            version = raw["format_version"]
            if version != FORMAT_VERSION:
                raise CheckpointError(
                    f"format version {version}; this megalite reads version {FORMAT_VERSION}"
                )
            tensors = {name: _tensor_from_dict(item) for name, item in raw["names"].items()}
            files = {
                name: StoredFile(int(item["bytes"]), str(item["sha256"]))
                for name, item in raw["files"].items()
            }
            index = cls(int(raw["iteration"]), int(raw["world_size"]), tensors, files)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{INDEX_FILE} is damaged ({type(error).__name__}: {error})"
            ) from error
        index._refuse_if_unsound()
        return index

    def _refuse_if_unsound(self) -> None:
        for name in self.files:
            # A name such as ../../secret would make the reader open files outside the checkpoint's folder.
            if name in ("", ".", "..") or "/" in name or "\\" in name:
                raise CheckpointError(
                    f"{INDEX_FILE}: unsafe file name {name!r}: it must lie in this folder"
                )
        for name, tensor in self.tensors.items():
            for part in tensor.boxes:
                if part.file not in self.files:
                    raise CheckpointError(
                        f"{INDEX_FILE}: {name} lies in {part.file!r}, which is not listed"
                    )
                if not lies_within(part.box, tensor.shape):
                    raise CheckpointError(
                        f"{INDEX_FILE}: {name}: {part.box} lies outside the shape {tensor.shape}"
                    )


def _tensor_to_dict(tensor: StoredTensor) -> dict:
    boxes = [
        {"file": part.file, "key": part.key, "offset": part.box.offset, "shape": part.box.shape}
        for part in tensor.boxes
    ]
    return {
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": tensor.shape,
        "boxes": boxes,
    }


def _tensor_from_dict(item: dict) -> StoredTensor:
    boxes = tuple(
        StoredBox(
            str(part["file"]), str(part["key"]), Box(_ints(part["offset"]), _ints(part["shape"]))
        )
        for part in item["boxes"]
    )
    return StoredTensor(_DTYPE_NAMES[item["dtype"]], _ints(item["shape"]), boxes)


def _ints(values: list) -> tuple[int, ...]:
    return tuple(map(int, values))


def rank_file(rank: int) -> str:
    """Name of the file in which a rank stores its boxes and its private tensors."""
    return f"weights-{rank:05d}.safetensors"


def write_file(path: Path, chunks: Iterable) -> StoredFile:
    """Write bytes-like chunks through to the disk (fsync) and return the file's size and checksum."""
    size, digest = 0, hashlib.sha256()
    with open(path, "wb") as file:
        for chunk in chunks:
            file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return StoredFile(size, digest.hexdigest())


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> StoredFile:
    """Write a safetensors file from tensors on any device, contiguous or not.

    Streamed here instead of `safetensors.torch.save_file`: only one tensor at a time is copied to the host, the
    checksum comes from the same pass, overlapping views are allowed, and the file has the user's permissions.
    """
    # Wide elements first: every tensor then begins at a multiple of its element size and can be mapped in place.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    entries, end = {}, 0
    for key, tensor in ordered:
        if tensor.dtype not in SAFETENSORS_DTYPES:
            raise CheckpointError(
                f"{key}: {tensor.dtype} cannot be stored; possible: {', '.join(_DTYPE_NAMES)}"
            )
        start, end = end, end + tensor.numel() * tensor.element_size()
        shape = list(tensor.shape)
        entries[key] = {
            "dtype": SAFETENSORS_DTYPES[tensor.dtype],
            "shape": shape,
            "data_offsets": [start, end],
        }
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    contents = (_raw_bytes(tensor) for _, tensor in ordered)
    return write_file(path, itertools.chain([struct.pack("<Q", len(header)), header], contents))


def _raw_bytes(tensor: torch.Tensor):
    """A 1-D uint8 array of the tensor's elements in row-major order, without a copy where they lie so already."""
    dense = tensor.detach().cpu().contiguous()
    # Not `view(-1)`: a dim of size 1 counts as contiguous whatever its stride, and a stride other than 1 has no bytes.
    return dense.as_strided((dense.numel(),), (1,)).view(torch.uint8).numpy()
