"""Checkpoints of torch.distributed.checkpoint (`.metadata`, `*.distcp`), read without running what
is in them.

`.metadata` is a pickle, and torch's own reader runs it. The unpickler here finds no class and no
function: whatever a pickle names becomes an `Inert` object, which holds what it was given. What is
known about the stored tensors is then looked up in these. The `.distcp` files are archives of
`torch.save`, one after another, which `torch.load(weights_only=True)` reads.
"""

import io
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megalite.checkpoint.folder import CheckpointError
from megalite.checkpoint.format import DTYPE_NAMES
from megalite.checkpoint.untrusted import file_name_in
from megalite.convert.megatron_file import Inert
from megalite.parallel.boxes import Box

METADATA = ".metadata"


class _InertUnpickler(pickle.Unpickler):
    """Gives data and `Inert` objects: nothing is imported, so nothing can be called."""

    def find_class(self, module: str, name: str) -> type[Inert]:
        """A class of its own for each name, which has nothing but the name."""
        return type(name, (Inert,), {})


@dataclass(frozen=True)
class Extent:
    """Where a part of a tensor, or an object, is: `length` bytes of `file` from `start` on."""

    file: str
    start: int
    length: int
    box: Box | None
    """The part; None: an object."""


@dataclass(frozen=True)
class TensorInParts:
    """A tensor and its parts."""

    dtype: torch.dtype | None
    """None: one that megalite does not have."""
    shape: tuple[int, ...]
    parts: tuple[Extent, ...]


class Distcp:
    """A folder that torch.distributed.checkpoint wrote. Raises CheckpointError when it cannot be
    read."""

    tensors: dict[str, TensorInParts]
    objects: dict[str, Extent]

    def __init__(self, folder: Path):
        self.folder = folder
        self.tensors = {}
        self.objects = {}
        path = folder / METADATA
        try:
            with open(path, "rb") as file:
                self._read(_InertUnpickler(file).load().state)
        # A damaged or foreign pickle, or one of another version, fails in many ways.
        except Exception as error:
            raise CheckpointError(f"{path}: {type(error).__name__}: {error}") from error

    def _read(self, state: dict[str, Any]) -> None:
        places = {}
        for index, info in state["storage_data"].items():
            offset = index.state.get("offset")
            place = info.state
            if place.get("transform_descriptors"):
                raise ValueError(f"{index.state['fqn']} is stored in a transformed way")
            where = None if offset is None else _ints(offset)
            places.setdefault(index.state["fqn"], {})[where] = place
        for name, entry in state["state_dict_metadata"].items():
            if "size" not in (entry.state or {}):
                (place,) = places[name].values()
                self.objects[name] = self._stored(place, None)
                continue
            parts = []
            for chunk in entry.state["chunks"]:
                box = Box(_ints(chunk.state["offsets"]), _ints(chunk.state["sizes"]))
                parts.append(self._stored(places[name][box.offset], box))
            dtype = DTYPE_NAMES.get(entry.state["properties"].state[0].__name__)
            for part in parts:
                if dtype is not None and part.box.numel * dtype.itemsize > part.length:
                    raise ValueError(f"{name}: {part.box} does not fit in {part.length} bytes")
            self.tensors[name] = TensorInParts(dtype, _ints(entry.state["size"]), tuple(parts))

    def _stored(self, place: dict[str, Any], box: Box | None) -> Extent:
        file = file_name_in(place["relative_path"])
        start = int(place["offset"])
        length = int(place["length"])
        size = (self.folder / file).stat().st_size
        if not 0 <= start <= start + length <= size:
            raise ValueError(f"{file} has {size} bytes, not {start + length}")
        return Extent(file, start, length, box)

    def bytes_of(self, stored: Extent) -> io.BytesIO:
        """The bytes of one part or object."""
        with open(self.folder / stored.file, "rb") as file:
            file.seek(stored.start)
            return io.BytesIO(file.read(stored.length))

    def read(self, name: str, box: Box) -> torch.Tensor:
        """A box of a tensor. Raises CheckpointError when its parts are not what was announced."""
        tensor = self.tensors[name]
        result = torch.empty(box.shape, dtype=tensor.dtype)
        filled = 0
        for part in tensor.parts:
            common = box.intersect(part.box)
            if common is None:
                continue
            try:
                values = torch.load(self.bytes_of(part), map_location="cpu", weights_only=True)
                if tuple(values.shape) != part.box.shape or values.dtype != tensor.dtype:
                    raise ValueError(f"{values.dtype} {tuple(values.shape)} instead of {part.box}")
            except Exception as error:  # as above
                raise CheckpointError(f"{self.folder / part.file}: {name}: {error}") from error
            result[common.slices_in(box)] = values[common.slices_in(part.box)]
            filled += common.numel
        if filled != box.numel:
            raise CheckpointError(f"{self.folder}: {name} is stored in part, or twice")
        return result


def _ints(size: Inert) -> tuple[int, ...]:
    """The numbers of a torch.Size."""
    return tuple(map(int, size.arguments[0]))
