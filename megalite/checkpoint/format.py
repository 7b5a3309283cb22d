"""The format of a checkpoint on disk: names of files, the index and the checks of an index.

docs/checkpoints.md specifies it for users. Nothing here communicates.
"""

import hashlib
import itertools
import json
import os
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path

import torch

from megalite.checkpoint.folder import INDEX_FILE, CheckpointError
from megalite.parallel.boxes import Box

FORMAT_VERSION = 1

SHOWN_PROBLEMS = 20
PRIVATE_PREFIX = "@"
"""Begins the keys of a rank's private tensors, which are no shard of a global tensor."""

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
    """A message of one line per problem, at most 20. total: how many there are (default: all
    of `problems`)."""
    shown = problems[:SHOWN_PROBLEMS]
    lines = [heading, *shown]
    unshown = (total or len(problems)) - len(shown)
    if unshown:
        lines.append(f"and {unshown} more")
    return "\n  ".join(lines)


@dataclass(frozen=True)
class DeferredTensor:
    """A tensor that is read when it is written, so that not all of a model is in memory at once."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]
    """Gives the tensor."""


@dataclass(frozen=True)
class Shard:
    """A rank's shard of a global tensor. `tensor` may be any view of shape `box.shape`.

    An empty box holds nothing. Raises ValueError when tensor, box and global shape do not fit.
    """

    name: str
    """Global name, the same in every layout: `layers.0.mlp.up.weight`. Without `@`, which marks
    keys in the files."""
    tensor: torch.Tensor | DeferredTensor
    global_shape: tuple[int, ...]
    box: Box

    def __post_init__(self):
        if not self.name or PRIVATE_PREFIX in self.name:
            raise ValueError(f"a shard needs a name without {PRIVATE_PREFIX!r}; got {self.name!r}")
        name = self.name
        box = self.box
        shape = tuple(self.tensor.shape)
        if shape != tuple(box.shape):
            raise ValueError(f"{name}: the tensor has shape {shape}, its box {box.shape}")
        if not box.lies_within(self.global_shape):
            raise ValueError(f"{name}: {box} does not lie in the global shape {self.global_shape}")


@dataclass(frozen=True)
class StoredShard:
    """Where one shard of a tensor is stored: under `key` in `file`."""

    file: str
    key: str
    box: Box


@dataclass(frozen=True)
class StoredTensor:
    """A global tensor and the shards it is stored in."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    shards: tuple[StoredShard, ...]

    def problems(self, name: str) -> list[str]:
        """Why the shards, which lie within the tensor, are not all of it: boxes that overlap, or
        elements that no box covers."""
        problems = []
        for one, other in itertools.combinations(self.shards, 2):
            if one.box.intersect(other.box):
                both = f"{one.box} in {one.file} and {other.box} in {other.file}"
                problems.append(f"{name}: {both} overlap")
        # Without overlaps, the shards cover the tensor when their elements are as many as its own.
        covered = sum(shard.box.numel for shard in self.shards)
        wanted = Box.whole(self.shape).numel
        if not problems and covered != wanted:
            share = f"only {covered} of the {wanted} elements of shape {self.shape}"
            problems.append(f"{name}: {share} are covered")
        return problems


@dataclass(frozen=True)
class StoredFile:
    """Size in bytes and SHA-256 of a file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Index:
    """The content of index.json: each tensor's shards, each other file's size and checksum."""

    iteration: int
    world_size: int
    tensors: dict[str, StoredTensor]
    files: dict[str, StoredFile]

    def to_json(self) -> str:
        """The text of index.json."""
        tensors = {name: _tensor_to_dict(tensor) for name, tensor in self.tensors.items()}
        files = {name: asdict(file) for name, file in self.files.items()}
        header = {"format_version": FORMAT_VERSION, "iteration": self.iteration}
        header["world_size"] = self.world_size
        return json.dumps({**header, "files": files, "names": tensors})

    @classmethod
    def from_json(cls, text: str) -> "Index":
        """Parse index.json. Raises CheckpointError when it is damaged, unsafe or of another format
        version."""
        try:
            raw = json.loads(text)
            version = raw["format_version"]
            if version != FORMAT_VERSION:
                raise CheckpointError(
                    f"format version {version}; this megalite reads version {FORMAT_VERSION}"
                )
            tensors = {name: _tensor_from_dict(item) for name, item in raw["names"].items()}
            files = {}
            for name, item in raw["files"].items():
                files[name] = StoredFile(int(item["bytes"]), str(item["sha256"]))
            index = cls(int(raw["iteration"]), int(raw["world_size"]), tensors, files)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise CheckpointError(f"{INDEX_FILE} is damaged ({reason})") from error
        index._refuse_if_unsound()
        return index

    def _refuse_if_unsound(self) -> None:
        for name in self.files:
            # A name such as ../../secret would open a file outside the checkpoint's folder.
            if name in ("", ".", "..") or "/" in name or "\\" in name:
                problem = f"unsafe file name {name!r}: it must lie in this folder"
                raise CheckpointError(f"{INDEX_FILE}: {problem}")
        for name, tensor in self.tensors.items():
            for shard in tensor.shards:
                where = f"{INDEX_FILE}: {name}"
                if shard.file not in self.files:
                    raise CheckpointError(f"{where} lies in {shard.file!r}, which is not listed")
                if not shard.box.lies_within(tensor.shape):
                    outside = f"{shard.box} lies outside the shape {tensor.shape}"
                    raise CheckpointError(f"{where}: {outside}")


def _tensor_to_dict(tensor: StoredTensor) -> dict:
    boxes = []
    for shard in tensor.shards:
        boxes.append({"file": shard.file, "key": shard.key, **asdict(shard.box)})
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {"dtype": dtype, "shape": tensor.shape, "boxes": boxes}


def _tensor_from_dict(item: dict) -> StoredTensor:
    shards = []
    for stored in item["boxes"]:
        box = Box(_ints(stored["offset"]), _ints(stored["shape"]))
        shards.append(StoredShard(str(stored["file"]), str(stored["key"]), box))
    return StoredTensor(_DTYPE_NAMES[item["dtype"]], _ints(item["shape"]), tuple(shards))


def _ints(values: list) -> tuple[int, ...]:
    return tuple(map(int, values))


def rank_file(rank: int) -> str:
    """Name of the file in which a rank stores its shards and its private tensors."""
    return f"weights-{rank:05d}.safetensors"


def write_file(path: Path, chunks: Iterable) -> StoredFile:
    """Write bytes-like chunks through to the disk (fsync); returns the file's size and checksum.

    Raises OSError, with the path, when the disk is full or fails.
    """
    size = 0
    digest = hashlib.sha256()
    try:
        with open(path, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
                digest.update(chunk)
                size += len(chunk)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:  # those of write() and fsync() name no file
        raise OSError(error.errno, error.strerror, str(path)) from None
    return StoredFile(size, digest.hexdigest())


def write_tensors(path: Path, tensors: dict[str, torch.Tensor | DeferredTensor]) -> StoredFile:
    """Write a safetensors file from tensors on any device, contiguous or not.

    Streamed here instead of `safetensors.torch.save_file`: only one tensor at a time is copied to
    the host, the checksum comes from the same pass, overlapping views are allowed, and the file has
    the user's permissions. Raises CheckpointError for a dtype that cannot be stored, OSError.
    """
    # Wide elements first: every tensor then begins at a multiple of its element size and can be
    # mapped in place.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    # The header: where each tensor's bytes begin and end.
    entries = {}
    end = 0
    for key, tensor in ordered:
        if tensor.dtype not in SAFETENSORS_DTYPES:
            possible = ", ".join(_DTYPE_NAMES)
            raise CheckpointError(f"{key}: {tensor.dtype} cannot be stored; possible: {possible}")
        start = end
        end += prod(tensor.shape) * tensor.dtype.itemsize
        dtype = SAFETENSORS_DTYPES[tensor.dtype]
        shape = list(tensor.shape)
        entries[key] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    # The bytes, one tensor at a time.
    contents = (_raw_bytes(tensor) for _, tensor in ordered)
    return write_file(path, itertools.chain([struct.pack("<Q", len(header)), header], contents))


def _raw_bytes(tensor: torch.Tensor | DeferredTensor):
    """The bytes of the tensor's elements in row-major order, as uint8 [n]; no copy of a contiguous
    tensor on the CPU."""
    if isinstance(tensor, DeferredTensor):
        wanted = (tensor.dtype, tuple(tensor.shape))
        tensor = tensor.read()
        found = (tensor.dtype, tuple(tensor.shape))
        if found != wanted:
            raise ValueError(f"a deferred tensor was announced as {wanted} and read as {found}")
    dense = tensor.detach().cpu().contiguous()
    # Not `view(-1)`: a dim of size 1 counts as contiguous whatever its stride, and a tensor with a
    # last stride other than 1 cannot be viewed as bytes.
    return dense.as_strided((dense.numel(),), (1,)).view(torch.uint8).numpy()
