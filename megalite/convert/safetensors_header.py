"""Where the tensors of a safetensors file are. Imports no torch; nothing in the file is trusted."""

import json
import os
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path

from megalite.checkpoint.folder import CheckpointError
from megalite.system.errors import explain_os_error

MOST_HEADER_BYTES = 100_000_000
"""Of the header, as the safetensors library has it."""
ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
"""Bytes of an element, by the name of its dtype."""


@dataclass(frozen=True)
class StoredBytes:
    """A tensor in a safetensors file."""

    file: Path
    key: str
    dtype: str
    """A key of ITEM_BYTES, or another one, which megalite cannot read."""
    shape: tuple[int, ...]
    start: int
    """Byte of the file at which its elements begin, in row-major order."""


def read_header(file: Path) -> dict[str, StoredBytes]:
    """The tensors of a safetensors file by key.

    Raises CheckpointError when the file cannot be read or its header does not describe it: sizes
    beyond the file, repeated keys, tensors that overlap.
    """
    try:
        with open(file, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            first = stream.read(8)
            length = struct.unpack("<Q", first)[0] if len(first) == 8 else -1
            if not 2 <= length <= min(MOST_HEADER_BYTES, size - 8):
                raise CheckpointError(f"{file}: no safetensors file, or a truncated one")
            text = stream.read(length)
    except OSError as error:
        raise CheckpointError(explain_os_error(error)) from None
    try:
        entries = json.loads(text, object_pairs_hook=_once)
        if not isinstance(entries, dict):
            raise ValueError("it is no object")
        entries.pop("__metadata__", None)
        tensors = {}
        for key, entry in entries.items():
            tensors[key] = _stored(file, key, entry, 8 + length)
        _refuse_gaps(tensors, entries, size - 8 - length)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{file}: its header is damaged ({reason})") from None
    return tensors


def _once(pairs: list) -> dict:
    """A JSON object whose names are all different."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is given twice")
    return found


def _stored(file: Path, key: str, entry: dict, base: int) -> StoredBytes:
    """One entry of the header; `base` is where the data begins."""
    start, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    dtype = str(entry["dtype"])
    if any(type(number) is not int or number < 0 for number in (start, end, *shape)):
        raise ValueError(f"{key} has a shape or place that is no whole number")
    if dtype in ITEM_BYTES and end - start != prod(shape) * ITEM_BYTES[dtype]:
        raise ValueError(f"{key}: {end - start} bytes are not shape {shape} of {dtype}")
    return StoredBytes(file, key, dtype, shape, base + start)


def _refuse_gaps(tensors: dict[str, StoredBytes], entries: dict, size: int) -> None:
    """Raise ValueError unless the tensors lie one after another and fill the file."""
    end = 0
    for key in sorted(tensors, key=lambda key: entries[key]["data_offsets"]):
        start, stop = entries[key]["data_offsets"]
        if start != end:
            raise ValueError(f"{key} begins at byte {start} of the data, not at {end}")
        end = stop
    if end != size:
        raise ValueError(f"its tensors have {end} bytes, the file has {size}: is it truncated?")
