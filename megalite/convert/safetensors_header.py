"""Where the tensors of a safetensors file are. Imports no torch; nothing in the file is trusted."""

import os
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path

from megalite.checkpoint.folder import CheckpointError, open_regular, parse_json

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
    descriptor = open_regular(file)
    try:
        size = os.fstat(descriptor).st_size
        first = os.pread(descriptor, 8, 0)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else -1
        if not 2 <= length <= min(MOST_HEADER_BYTES, size - 8):
            raise CheckpointError(f"{file}: no safetensors file, or a truncated one")
        text = os.pread(descriptor, length, 8)
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}") from None
    finally:
        os.close(descriptor)
    entries = parse_json(text, f"{file}: its header")
    try:
        entries.pop("__metadata__", None)
        tensors = {}
        for key, entry in entries.items():
            tensors[key] = _stored(file, key, entry, 8 + length)
        _refuse_gaps(tensors, entries, size - 8 - length)
    except (ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{file}: its header is damaged ({reason})") from None
    return tensors


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
