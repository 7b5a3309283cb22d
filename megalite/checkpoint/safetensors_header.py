"""Where the tensors of a safetensors file are. Imports no torch; nothing in the file is trusted."""

import os
from dataclasses import dataclass
from math import prod
from pathlib import Path

from megalite.checkpoint.folder import DamagedCheckpointError, open_regular, parse_json
from megalite.checkpoint.untrusted import shape_in, size_in, text_in

LONGEST_HEADER = 100_000_000
"""Bytes; the limit of safetensors."""
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
    bytes: int


def read_tensors(file: Path) -> dict[str, StoredBytes]:
    """The tensors of a safetensors file by key, from its header. Raises DamagedCheckpointError when
    the file cannot be read, or its header does not describe it."""
    descriptor = open_regular(file)
    try:
        return tensors_of(file, descriptor, read_header(file, descriptor))
    finally:
        os.close(descriptor)


def read_header(file: Path, descriptor: int) -> bytes:
    """The header of an open file: its length in 8 bytes, and the text. Raises
    DamagedCheckpointError, before memory is allocated for a header that cannot be there."""
    size = os.fstat(descriptor).st_size
    if size < 8:
        raise DamagedCheckpointError(f"{file} is no safetensors file: it has {size} bytes")
    prefix = bytearray(8)
    read_exactly(file, descriptor, prefix, offset=0, what="the header")
    length = int.from_bytes(prefix, "little")
    if not 2 <= length <= min(size - 8, LONGEST_HEADER):
        states = f"it states a header of {length} bytes, and has {size}"
        raise DamagedCheckpointError(f"{file} is no safetensors file: {states}")
    text = bytearray(length)
    read_exactly(file, descriptor, text, offset=8, what="the header")
    return bytes(prefix + text)


def tensors_of(file: Path, descriptor: int, header: bytes) -> dict[str, StoredBytes]:
    """The tensors by key that the header of an open file names. They lie one after another and fill
    the file. Raises DamagedCheckpointError."""
    entries = parse_json(header[8:], f"{file}: the header")
    entries.pop("__metadata__", None)
    size = os.fstat(descriptor).st_size
    tensors = {}
    for key, entry in entries.items():
        try:
            tensors[key] = _stored(file, key, entry, first=len(header), size=size)
        except (ValueError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise DamagedCheckpointError(f"{file}: {key!r:.200}: {reason}") from error
    end = len(header)
    before = "the header"
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.bytes)):
        if tensor.start < end:
            raise DamagedCheckpointError(f"{file}: {before} and {tensor.key!r} overlap")
        if tensor.start > end:
            gap = f"there is a gap between {before} and {tensor.key!r}"
            raise DamagedCheckpointError(f"{file}: {gap}")
        end += tensor.bytes
        before = repr(tensor.key)
    if end != size:
        raise DamagedCheckpointError(f"{file} has {size} bytes, and its last tensor ends at {end}")
    return tensors


def _stored(file: Path, key: str, entry: dict, *, first: int, size: int) -> StoredBytes:
    """One entry of the header. first: where the tensors begin; size: of the file."""
    if type(entry) is not dict or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError("it should have dtype, shape and data_offsets")
    dtype = text_in(entry["dtype"])
    shape = shape_in(entry["shape"])
    start, stop = map(size_in, entry["data_offsets"])
    if not start <= stop <= size - first:
        raise ValueError(f"bytes {start} to {stop} of {size - first}: is the file truncated?")
    if dtype in ITEM_BYTES and stop - start != prod(shape) * ITEM_BYTES[dtype]:
        raise ValueError(f"{stop - start} bytes for shape {shape} of {dtype}")
    return StoredBytes(file, key, dtype, shape, first + start, stop - start)


def read_exactly(file: Path, descriptor: int, out, *, offset: int, what: str) -> None:
    """Fill `out`, a buffer of bytes, from an open file, from byte `offset` on. Raises
    DamagedCheckpointError, with `what` is read, when there are not as many bytes."""
    out = memoryview(out)
    while len(out):
        try:
            count = os.preadv(descriptor, [out], offset)
        except OSError as error:
            where = f"{file}: {what} cannot be read"
            raise DamagedCheckpointError(f"{where}: {error.strerror}") from error
        if not count:
            raise DamagedCheckpointError(f"{file}: {what}: the file ends at {offset}")
        out = out[count:]
        offset += count
