"""What a checkpoint holds, also a damaged one, and how two differ."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from megalite.checkpoint.folder import (
    CONFIG_FILE,
    INDEX_FILE,
    STATE_FILE,
    CheckpointError,
    parse_text,
    read_file,
    read_json,
)
from megalite.checkpoint.format import PRIVATE_PREFIX, Index, StoredTensor, dtype_name
from megalite.checkpoint.source import TensorSource
from megalite.checkpoint.tensor_file import TensorFile
from megalite.parallel.boxes import Box

COMPARED_ELEMENTS = 1 << 22
"""Of a tensor, at most so many elements are compared at once."""
WEIGHTS = "weights"


@dataclass
class Group:
    """Tensors of one kind: the weights, or one that the optimizer keeps for each weight."""

    tensors: int = 0
    elements: int = 0
    bytes: int = 0
    dtypes: list[str] = field(default_factory=list)

    def add(self, tensor: StoredTensor) -> None:
        """Count one more."""
        self.tensors += 1
        self.elements += Box.whole(tensor.shape).numel
        self.bytes += tensor.bytes
        dtype = dtype_name(tensor.dtype)
        if dtype not in self.dtypes:
            self.dtypes.append(dtype)


@dataclass
class Inspection:
    """What could be read of one checkpoint."""

    folder: Path
    index: Index | None = None
    state: dict | None = None
    config_yaml: str | None = None
    groups: dict[str, Group] = field(default_factory=dict)
    """By kind: weights, optimizer.exp_avg, ..."""
    files: dict[str, int | None] = field(default_factory=dict)
    """Bytes of each file that is there or should be; None: it is missing."""
    problems: list[str] = field(default_factory=list)
    """What could not be read."""

    @contextmanager
    def problems_kept(self) -> Iterator[None]:
        """Add the error that the block raises to `problems`."""
        try:
            yield
        except CheckpointError as error:
            self.problems.append(str(error))

    def to_json(self, verified: bool) -> str:
        """All of it but the tensors. verified: whether `problems` has what a verification found."""
        index = self.index
        facts = {"folder": str(self.folder), "state": self.state, "files": self.files}
        if index is not None:
            facts["iteration"] = index.iteration
            facts["world_size"] = index.world_size
            facts["format_version"] = index.format_version
            facts["written_by"] = index.written_by
        facts["groups"] = {kind: asdict(group) for kind, group in self.groups.items()}
        facts |= {"verified": verified, "problems": self.problems}
        return json.dumps(facts, indent=1)


def inspect(folder: Path) -> Inspection:
    """Look at the checkpoint in this folder as far as it can be read; no tensor is read.

    Without a readable index, the shards that are there are those in the headers of the files.
    """
    found = Inspection(folder)
    with found.problems_kept():
        found.index = Index.from_json(read_file(folder / INDEX_FILE), folder / INDEX_FILE)
    with found.problems_kept():
        found.state = read_json(folder / STATE_FILE)
    with found.problems_kept():
        content = read_file(folder / CONFIG_FILE)
        found.config_yaml = parse_text(content, folder / CONFIG_FILE)
    # The files: those that are there, and those that should be.
    names = sorted(path.name for path in folder.iterdir())
    expected = [] if found.index is None else found.index.files
    for name in dict.fromkeys([*names, *expected]):
        path = folder / name
        found.files[name] = path.stat().st_size if path.exists() else None
    tensors = found.index.tensors if found.index else _tensors_in_headers(found)
    for name in tensors:
        with found.problems_kept():
            found.groups.setdefault(kind_of(name), Group()).add(tensors[name])
    return found


def kind_of(name: str) -> str:
    """`optimizer.exp_avg` of `optimizer.exp_avg.layers.0.mlp.up.weight`; weights."""
    match = re.match(r"optimizer\.[^.]+(?=\.)", name)
    return match[0] if match else WEIGHTS


def _tensors_in_headers(found: Inspection) -> dict[str, StoredTensor]:
    """Every shard in the files as a tensor of its own, by file and key."""
    tensors = {}
    for name in found.files:
        if not name.endswith(".safetensors"):
            continue
        with found.problems_kept():
            file = TensorFile(found.folder / name, stored=None)
            for key, entry in file.entries.items():
                if not key.startswith(PRIVATE_PREFIX):
                    # The kind comes first in the name.
                    tensors[f"{key} in {name}"] = StoredTensor(entry.dtype, entry.shape, ())
            file.close()
    return tensors


@dataclass(frozen=True)
class Difference:
    """How the values of a tensor differ between two checkpoints."""

    name: str
    note: str = ""
    """Why the values cannot be compared; else empty."""
    elements: int = 0
    """How many differ."""
    absolute: float = 0.0
    """The largest |a - b|; inf where one of them is NaN."""
    relative: float = 0.0
    """The largest |a - b| / max(|a|, |b|)."""


def differences(one: TensorSource, other: TensorSource) -> Iterator[Difference]:
    """Each tensor that is not the same in both, whatever their layouts, in the order of names. A
    part of one tensor is in memory at a time."""
    for name in sorted({*one.names, *other.names}):
        if name not in other.names:
            yield Difference(name, f"only in {one.folder}")
        elif name not in one.names:
            yield Difference(name, f"only in {other.folder}")
        elif one.shape(name) != other.shape(name):
            yield Difference(name, f"shapes {one.shape(name)} and {other.shape(name)}")
        else:
            found = _difference(name, one, other)
            if found.elements or found.note:
                yield found


def _difference(name: str, one: TensorSource, other: TensorSource) -> Difference:
    elements = 0
    absolute = 0.0
    relative = 0.0
    for box in _parts(Box.whole(one.shape(name))):
        a, b = (source.read(name, box) for source in (one, other))
        differs = ~((a == b) | (a.isnan() & b.isnan()))
        count = int(differs.sum())
        if not count:
            continue
        a, b = a[differs].double(), b[differs].double()
        gap = (a - b).abs().nan_to_num(nan=torch.inf)
        share = (gap / torch.maximum(a.abs(), b.abs())).nan_to_num(nan=torch.inf)
        elements += count
        absolute = max(absolute, float(gap.max()))
        relative = max(relative, float(share.max()))
    a, b = (source.dtype(name) for source in (one, other))
    note = "" if a == b else f"dtypes {dtype_name(a)} and {dtype_name(b)}"
    return Difference(name, note, elements, absolute, relative)


def _parts(box: Box) -> Iterator[Box]:
    """The box in parts of a limited number of elements."""
    if box.numel <= COMPARED_ELEMENTS:
        yield box
    else:
        for half in box.halves():
            yield from _parts(half)
