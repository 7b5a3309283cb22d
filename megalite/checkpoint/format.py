"""The format of a checkpoint on disk: names of files, the index and the checks of an index.

docs/checkpoints.md specifies it for users. Nothing here communicates.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod

import torch

from megalite import __version__
from megalite.checkpoint.checksum import BLOCK_BYTES, DIGITS, number_of_blocks
from megalite.checkpoint.folder import INDEX_FILE, SHOWN_PROBLEMS, DamagedCheckpointError
from megalite.checkpoint.text_files import FORMAT_VERSION, StoredFile, parse_index, with_checksum
from megalite.checkpoint.untrusted import file_name_in, shape_in, size_in, text_in
from megalite.parallel.boxes import Box, tile

_BOXES = re.compile("[0-9a-f ,;]*")
PRIVATE_PREFIX = "@"
"""Begins the keys of a rank's private tensors, which are no shard of a global tensor."""

OPTIMIZER = "optimizer."
"""Begins the names of what the optimizer keeps for a parameter: its kind and the parameter follow,
`optimizer.exp_avg.layers.0.mlp.up.weight`."""
MASTER = OPTIMIZER + "master."
"""Begins the names of fp32 master weights."""

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
SAFETENSORS_NAMES = {name: dtype for dtype, name in SAFETENSORS_DTYPES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` of torch.float32."""
    return str(dtype).removeprefix("torch.")


DTYPE_NAMES = {dtype_name(dtype): dtype for dtype in SAFETENSORS_DTYPES}


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


@dataclass(frozen=True, slots=True)
class StoredShard:
    """Where one shard of a tensor is stored: under `key` in `file`."""

    file: str
    key: str
    box: Box
    checksums: str | None = None
    """Of its blocks, one after the other. None in version 1, which has none."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A global tensor and the shards it is stored in."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    shards: tuple[StoredShard, ...]

    @property
    def bytes(self) -> int:
        """Size of the whole tensor."""
        return prod(self.shape) * self.dtype.itemsize

    def problems(self, name: str) -> list[str]:
        """Why the shards, which lie within the tensor, are not all of it: boxes that overlap, or
        elements that no box covers."""
        if tile((shard.box for shard in self.shards), self.shape):
            return []
        problems = self._overlaps(name)
        if problems:
            return problems
        # Without overlaps, the shards cover as many elements as they have.
        covered = sum(shard.box.numel for shard in self.shards)
        share = f"only {covered} of the {prod(self.shape)} elements of shape {self.shape}"
        return [f"{name}: {share} are covered"]

    def _overlaps(self, name: str) -> list[str]:
        """The first overlaps. Passes over the boxes in the order of their beginnings along the dim
        in which these differ most, beside the boxes that have not ended there."""
        dims = range(len(self.shape))
        dim = max(dims, key=lambda d: len({s.box.offset[d] for s in self.shards}), default=None)
        if dim is None:
            ordered = self.shards
        else:
            ordered = sorted(self.shards, key=lambda shard: shard.box.offset[dim])
        problems = []
        begun: list[StoredShard] = []
        for one in ordered:
            if dim is not None:
                begun = [other for other in begun if other.box.stop[dim] > one.box.offset[dim]]
            for other in begun:
                if one.box.intersect(other.box):
                    both = f"{other.box} in {other.file} and {one.box} in {one.file}"
                    problems.append(f"{name}: {both} overlap")
            if len(problems) > SHOWN_PROBLEMS:
                break
            begun.append(one)
        return problems


@dataclass(frozen=True)
class Index:
    """The content of index.json: each tensor's shards, each other file's size and checksum."""

    iteration: int
    world_size: int
    tensors: Mapping[str, StoredTensor]
    files: dict[str, StoredFile]
    format_version: int = FORMAT_VERSION
    written_by: str = f"megalite {__version__}"
    """The program that wrote it."""

    def to_json(self) -> str:
        """The text of index.json, which ends with the checksum of what is before it."""
        header = {
            "format_version": FORMAT_VERSION,
            "written_by": self.written_by,
            "iteration": self.iteration,
            "world_size": self.world_size,
            "block_bytes": BLOCK_BYTES,
        }
        files = {}
        for name, file in self.files.items():
            files[name] = {"bytes": file.bytes, "xxh3": file.xxh3}
            if file.private:
                files[name]["private"] = file.private
        numbers = {name: number for number, name in enumerate(files)}
        tensors = {}
        for name, tensor in self.tensors.items():
            dtype = dtype_name(tensor.dtype)
            boxes = ";".join(_box_to_text(shard, numbers) for shard in tensor.shards)
            tensors[name] = {"dtype": dtype, "shape": tensor.shape, "boxes": boxes}
        content = {**header, "files": files, "names": tensors}
        return with_checksum(json.dumps(content, separators=(",", ":")))

    @classmethod
    def from_json(cls, text: bytes, source: object = INDEX_FILE) -> "Index":
        """Parse index.json, of the current version or an older one.

        Raises DamagedCheckpointError when it is damaged or unsafe, CheckpointError when a later
        version of megalite wrote it.
        """
        raw = parse_index(text, source)
        try:
            return _INDEX_READERS[raw.get("format_version")](raw)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise DamagedCheckpointError(f"{source} is damaged ({reason})") from error


def _box_to_text(shard: StoredShard, numbers: dict[str, int]) -> str:
    """Number of the file, number of the shard in its file, offset, shape and checksums."""
    box = shard.box
    number = shard.key.partition(PRIVATE_PREFIX)[2] or "0"
    offset = ",".join(map(str, box.offset))
    shape = ",".join(map(str, box.shape))
    return f"{numbers[shard.file]} {number} {offset} {shape} {shard.checksums}"


def shard_key(name: str, number: int) -> str:
    """The key of a rank's shard `number` of a tensor, in the order in which it stores them."""
    return f"{name}{PRIVATE_PREFIX}{number}" if number else name


def _read_version_1(raw: dict) -> Index:
    files = {}
    for name, item in raw["files"].items():
        size = size_in(item["bytes"])
        files[file_name_in(name)] = StoredFile(size, sha256=text_in(item["sha256"]))
    tensors = {}
    for name, item in raw["names"].items():
        dtype = DTYPE_NAMES[item["dtype"]]
        shape = shape_in(item["shape"])
        shards = []
        for stored in item["boxes"]:
            box = Box(shape_in(stored["offset"]), shape_in(stored["shape"]))
            shards.append(StoredShard(text_in(stored["file"]), text_in(stored["key"]), box))
            if shards[-1].file not in files:
                raise ValueError(f"{name} lies in {shards[-1].file!r}, which is not listed")
            if not box.lies_within(shape):
                raise ValueError(f"{name}: {box} lies outside the shape {shape}")
        tensors[name] = StoredTensor(dtype, shape, tuple(shards))
    counts = (size_in(raw["iteration"]), size_in(raw["world_size"]))
    return Index(*counts, tensors, files, format_version=1, written_by="megalite 0.1.0")


def _read_version_2(raw: dict) -> Index:
    if raw["block_bytes"] != BLOCK_BYTES:
        raise ValueError(f"blocks of {raw['block_bytes']!r} bytes instead of {BLOCK_BYTES}")
    files = {}
    for name, item in raw["files"].items():
        private = {}
        for key, checksums in item.get("private", {}).items():
            private[key] = text_in(checksums)
        size = size_in(item["bytes"])
        files[file_name_in(name)] = StoredFile(size, text_in(item["xxh3"]), private)
    entries = {}
    for name, item in raw["names"].items():
        dtype = DTYPE_NAMES[item["dtype"]]
        entries[name] = (dtype, shape_in(item["shape"]), text_in(item["boxes"]))
    counts = (size_in(raw["iteration"]), size_in(raw["world_size"]))
    tensors = _TensorsInText(entries, list(files))
    return Index(*counts, tensors, files, written_by=text_in(raw["written_by"]))


class _TensorsInText(Mapping):
    """The tensors of an index by name. The boxes of one, as text, are read when it is asked for: a
    rank needs those of a few, and thousands of ranks may have written boxes of each."""

    def __init__(self, entries: dict[str, tuple[torch.dtype, tuple, str]], files: list[str]):
        self._entries = entries
        self._files = files
        self._read: dict[str, StoredTensor] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, name: str) -> StoredTensor:
        if name not in self._read:
            dtype, shape, text = self._entries[name]
            try:
                shards = self._shards(name, dtype, shape, text)
            except (ValueError, IndexError) as error:
                reason = f"{name}: {type(error).__name__}: {error}"
                raise DamagedCheckpointError(f"{INDEX_FILE} is damaged ({reason})") from error
            self._read[name] = StoredTensor(dtype, shape, shards)
        return self._read[name]

    def _shards(
        self, name: str, dtype: torch.dtype, shape: tuple[int, ...], text: str
    ) -> tuple[StoredShard, ...]:
        if not _BOXES.fullmatch(text):
            raise ValueError(f"{text[:80]!r} is no list of boxes")
        shards = []
        for stored in text.split(";") if text else ():
            file, number, offset, box_shape, checksums = stored.split(" ")
            box = Box(_sizes_in(offset), _sizes_in(box_shape))
            if not box.lies_within(shape):
                raise ValueError(f"{box} lies outside the shape {shape}")
            blocks = number_of_blocks(box.numel * dtype.itemsize)
            if len(checksums) != blocks * DIGITS:
                raise ValueError(f"{box} has {blocks} blocks and the checksums {checksums[:80]!r}")
            key = shard_key(name, int(number))
            shards.append(StoredShard(self._files[int(file)], key, box, checksums))
        return tuple(shards)


def _sizes_in(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(","))) if text else ()


_INDEX_READERS = {1: _read_version_1, 2: _read_version_2}


def rank_file(rank: int) -> str:
    """Name of the file in which a rank stores its shards and its private tensors."""
    return f"weights-{rank:05d}.safetensors"
