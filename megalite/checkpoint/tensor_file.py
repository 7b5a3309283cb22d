"""One file of tensors, in the format of safetensors: written with checksums in one pass, and read
by ranges of bytes, each of which is compared with its checksums."""

import json
import os
import struct
from collections.abc import Iterable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from megalite.checkpoint.checksum import BLOCK_BYTES, DIGITS, Checksum, blocks_of, checksum
from megalite.checkpoint.folder import CheckpointError, DamagedCheckpointError, open_regular
from megalite.checkpoint.format import (
    DTYPE_NAMES,
    PRIVATE_PREFIX,
    SAFETENSORS_DTYPES,
    SAFETENSORS_NAMES,
    DeferredTensor,
    StoredFile,
)
from megalite.checkpoint.safetensors_header import read_exactly, read_header, tensors_of
from megalite.parallel.boxes import Box

PIECE_BYTES = 256 << 10
"""Of a block, as much is read and hashed at once: it is still in the cache of the core."""
STRIDED_BYTES = 64 << 20
"""Of a box that is not contiguous in the file, at most about this much is read at once."""


def write_file(path: Path, content: bytes) -> StoredFile:
    """Write a file through to the disk (fsync); returns its size and checksum.

    Raises OSError, with the path, when the disk is full or fails.
    """
    _write(path, [content])
    return StoredFile(len(content), checksum(content))


def _write(path: Path, chunks: Iterable) -> int:
    """Write bytes-like chunks through to the disk. Returns how many bytes. Raises OSError."""
    size = 0
    begun = 0
    try:
        with open(path, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
                size += len(chunk)
                if size - begun >= BLOCK_BYTES:
                    # The disk begins with what is there, in place of at the fsync: with this
                    # advice, Linux starts to write pages that it cannot drop yet.
                    os.posix_fadvise(file.fileno(), begun, size - begun, os.POSIX_FADV_DONTNEED)
                    begun = size
                del chunk  # of a tensor that nothing else may hold any more
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:  # those of write() and fsync() name no file
        raise OSError(error.errno, error.strerror, str(path)) from None
    return size


def write_tensors(
    path: Path,
    tensors: dict[str, torch.Tensor | DeferredTensor],
    metadata: dict[str, str] | None = None,
) -> tuple[StoredFile, dict[str, str]]:
    """Write a safetensors file from tensors on any device, contiguous or not. metadata: texts of
    the file itself.

    Streamed here instead of `safetensors.torch.save_file`: only one tensor at a time is copied to
    the host, checksums come from the same pass, overlapping views are allowed, and the file has
    the user's permissions. A deferred tensor is read by a thread while the one before it is
    written: at most two of these are in memory. Returns the file, and the checksums of each
    tensor's blocks by key. Raises CheckpointError for a dtype that cannot be stored, OSError.
    """
    # Wide elements first: every tensor then begins at a multiple of its element size and can be
    # mapped in place.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    # The header: where each tensor's bytes begin and end.
    entries: dict[str, dict] = {} if metadata is None else {"__metadata__": metadata}
    end = 0
    for key, tensor in ordered:
        if tensor.dtype not in SAFETENSORS_DTYPES:
            possible = ", ".join(DTYPE_NAMES)
            raise CheckpointError(f"{key}: {tensor.dtype} cannot be stored; possible: {possible}")
        start = end
        end += prod(tensor.shape) * tensor.dtype.itemsize
        dtype = SAFETENSORS_DTYPES[tensor.dtype]
        shape = list(tensor.shape)
        entries[key] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    checksums: dict[str, str] = {}

    def chunks(reader: Executor) -> Iterable:
        yield header
        for key, data in _read_ahead(ordered, reader):
            found = []
            for _, start, stop in blocks_of(len(data)):
                found.append(checksum(data[start:stop]))
                yield data[start:stop]
            checksums[key] = "".join(found)
            del data  # its memory is free before the reader begins with the next but one

    with ThreadPoolExecutor(1, "read ahead") as reader:  # starts its thread when it is used
        size = _write(path, chunks(reader))
    private = {}
    for key in list(checksums):
        if key.startswith(PRIVATE_PREFIX):
            private[key.removeprefix(PRIVATE_PREFIX)] = checksums.pop(key)
    return StoredFile(size, checksum(header), private), checksums


def _read_ahead(tensors: list[tuple], reader: Executor) -> Iterable[tuple]:
    """(key, bytes) of each (key, tensor). While the caller uses the bytes of one, the reader's
    thread reads the next one, if that is deferred: at most two are in memory."""
    ahead = None
    for number, (key, tensor) in enumerate(tensors, 1):
        data = _raw_bytes(tensor) if ahead is None else ahead.result()
        ahead = None
        if number < len(tensors) and isinstance(tensors[number][1], DeferredTensor):
            ahead = reader.submit(_raw_bytes, tensors[number][1])
        yield key, data


def _raw_bytes(tensor: torch.Tensor | DeferredTensor):
    """The bytes of the tensor's elements in row-major order, as uint8 [n]; no copy of a contiguous
    tensor on the CPU."""
    if isinstance(tensor, DeferredTensor):
        wanted = (tensor.dtype, tuple(tensor.shape))
        tensor = tensor.read()
        found = (tensor.dtype, tuple(tensor.shape))
        if found != wanted:
            raise ValueError(f"a deferred tensor was announced as {wanted} and read as {found}")
    return _bytes_of(tensor.detach().cpu().contiguous())


def _bytes_of(dense: torch.Tensor):
    """The memory of a contiguous tensor, as uint8 [n]."""
    # Not `view(-1)`: a dim of size 1 counts as contiguous whatever its stride, and a tensor with a
    # last stride other than 1 cannot be viewed as bytes.
    return dense.as_strided((dense.numel(),), (1,)).view(torch.uint8).numpy()


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: what the header says of it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """Where its bytes begin in the file."""
    bytes: int


class TensorFile:
    """A safetensors file to read. Nothing is allocated before it is compared with the file's size.

    Args:
        path: of the file.
        stored: what the index says of it. None: nothing is known, and nothing is compared.
        verify: whether to compare what is read with its checksums.

    Raises DamagedCheckpointError, here and in each method, when the file is missing, cannot be
    read or is not what was written; the message names it and the tensor.
    """

    def __init__(self, path: Path, stored: StoredFile | None, verify: bool = True):
        self.path = path
        self.verify = verify
        self._descriptor = open_regular(path)
        try:
            self.entries = self._read_header(stored)
            """By key."""
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1

    def __del__(self):
        if hasattr(self, "_descriptor"):
            self.close()

    def entry(self, key: str) -> Entry:
        """What the header says of a tensor."""
        if key not in self.entries:
            raise DamagedCheckpointError(f"{self.path} does not hold {key}")
        return self.entries[key]

    def read_box(self, key: str, stored: Box, checksums: str | None, box: Box, out) -> None:
        """Fill the tensor `out`, of the box's shape, with one box of a tensor.

        stored: the box that is stored under this key, as a part of the same global tensor.
        checksums: of the blocks of what is stored; None: there are none.
        """
        if not box.numel:
            return
        entry = self.entry(key)
        # The range of elements from the first to the last that is wanted.
        strides = [prod(stored.shape[dim + 1 :]) for dim in range(len(stored.shape))]
        first = 0
        length = 1
        for dim, stride in enumerate(strides):
            first += (box.offset[dim] - stored.offset[dim]) * stride
            length += (box.shape[dim] - 1) * stride
        itemsize = entry.dtype.itemsize
        start = first * itemsize
        size = length * itemsize
        if length == box.numel and out.is_contiguous():
            self._read(key, checksums, start, _bytes_of(out))
        elif size > STRIDED_BYTES:
            for part in box.halves():
                self.read_box(key, stored, checksums, part, out[part.slices_in(box)])
        else:
            data = torch.empty(length, dtype=entry.dtype)
            self._read(key, checksums, start, _bytes_of(data))
            out.copy_(data.as_strided(box.shape, strides))

    def check(self, key: str, checksums: str) -> None:
        """Read all of a tensor and compare it with its checksums."""
        entry = self.entry(key)
        buffer = memoryview(bytearray(min(entry.bytes, BLOCK_BYTES)))
        for number, start, stop in blocks_of(entry.bytes):
            self._read_block(key, checksums, number, buffer[: stop - start])

    def _read(self, key: str, checksums: str | None, start: int, out) -> None:
        """Fill `out` with the bytes of a tensor from `start` on. A block is verified whole: those
        at both ends may have to be read beyond what is wanted."""
        entry = self.entry(key)
        out = memoryview(out)
        stop = start + len(out)
        if not self.verify or checksums is None:
            self._fill(key, entry.start + start, out)
            return
        for number, first, last in blocks_of(entry.bytes, start, stop):
            is_inside = start <= first and last <= stop
            if is_inside:
                self._read_block(key, checksums, number, out[first - start : last - start])
            else:
                block = memoryview(bytearray(last - first))
                self._read_block(key, checksums, number, block)
                begin = max(first, start)
                end = min(last, stop)
                out[begin - start : end - start] = block[begin - first : end - first]

    def _read_block(self, key: str, checksums: str, number: int, block: memoryview) -> None:
        """Fill `block` with a whole block of a tensor and compare it with its checksum."""
        first = self.entry(key).start + number * BLOCK_BYTES
        found = Checksum()
        for begin in range(0, len(block), PIECE_BYTES):
            piece = block[begin : begin + PIECE_BYTES]
            self._fill(key, first + begin, piece)
            found.update(piece)
        expected = checksums[number * DIGITS : (number + 1) * DIGITS]
        if found.hexdigest() != expected:
            place = f"bytes {first} to {first + len(block)}"
            raise DamagedCheckpointError(
                f"{self.path}: {key}: {place} differ from their checksum: they were damaged after "
                "they were written"
            )

    def _fill(self, what: str, offset: int, out) -> None:
        """Read as many bytes as `out` has, from `offset` on."""
        read_exactly(self.path, self._descriptor, out, offset=offset, what=what)

    def _read_header(self, stored: StoredFile | None) -> dict[str, Entry]:
        size = os.fstat(self._descriptor).st_size
        if stored is not None and size != stored.bytes:
            raise DamagedCheckpointError(f"{self.path} has {size} bytes instead of {stored.bytes}")
        header = read_header(self.path, self._descriptor)
        if self.verify and stored is not None and stored.xxh3 is not None:
            if checksum(header) != stored.xxh3:
                raise DamagedCheckpointError(f"{self.path}: its header differs from its checksum")
        entries = {}
        for key, tensor in tensors_of(self.path, self._descriptor, header).items():
            if tensor.dtype not in SAFETENSORS_NAMES:
                unknown = f"unknown dtype {tensor.dtype!r:.40}"
                raise DamagedCheckpointError(f"{self.path}: {key!r:.200}: {unknown}")
            dtype = SAFETENSORS_NAMES[tensor.dtype]
            entries[key] = Entry(dtype, tensor.shape, tensor.start, tensor.bytes)
        return entries
