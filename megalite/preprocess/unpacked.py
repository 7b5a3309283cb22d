"""Compressed files and Parquet, which must be read from their beginning, as streams."""

import importlib.util
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from megalite.data.indexed import DatasetError

COMPRESSED = (".gz", ".xz", ".zst")
LIBRARIES = {".zst": "zstandard", ".parquet": "pyarrow"}
"""Optional libraries, by the suffix of the files that need them."""
UNSUPPORTED = (".bz2", ".zip", ".lz4", ".7z", ".br", ".z", ".tar", ".tgz", ".lzma", ".zstd")
UNSUPPORTED += (".sz", ".rar")
"""Suffixes of compressed files that are not read."""
BUFFER_BYTES = 1 << 20
"""Bytes of uncompressed content that are buffered."""
COMPRESSED_BYTES = 1 << 16
"""Bytes of a compressed file that are unpacked at a time."""


def suffix_of(path: str | Path) -> str:
    """The suffix of a file's name, in small letters."""
    return Path(path).suffix.lower()


def has_library(suffix: str) -> bool:
    """Whether the library that reads files of this suffix is installed, if they need one."""
    return suffix not in LIBRARIES or importlib.util.find_spec(LIBRARIES[suffix]) is not None


@contextmanager
def unpacked(path: str, keys: tuple[str, ...]):
    """A binary file of the content of a compressed file, or of a Parquet file's rows as JSON lines.

    Raises DatasetError for a damaged file, and for one that is cut short or lacks one of the
    columns `keys`.
    """
    with _reporting_damage(path):
        if suffix_of(path) == ".parquet":
            yield io.BufferedReader(_ChunkReader(_parquet_lines(path, keys)), BUFFER_BYTES)
        else:
            with open(path, "rb") as file:
                chunks = _decompressed(file, suffix_of(path))
                yield io.BufferedReader(_ChunkReader(chunks), BUFFER_BYTES)


def _decompressor(suffix: str):
    """A new decompressor of one frame, member or stream.

    Whatever the suffix, it has `decompress`, `eof` and `unused_data`.
    """
    if suffix == ".gz":
        return zlib.decompressobj(wbits=31)
    if suffix == ".xz":
        return lzma.LZMADecompressor(lzma.FORMAT_XZ)
    import zstandard

    # The largest window that zstd --long=31 writes.
    return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()


def _decompressed(file: BinaryIO, suffix: str) -> Iterator[bytes]:
    """The content of a compressed file of any number of frames.

    Raises EOFError where the last frame is cut short.
    """
    frame = None
    data = b""
    while data or (data := file.read(COMPRESSED_BYTES)):
        if frame is None:
            data = data.lstrip(b"\0")  # zeros may pad a frame
            if not data:
                continue
            frame = _decompressor(suffix)
        yield frame.decompress(data)
        data = b""
        if frame.eof:
            data = frame.unused_data
            frame = None
    if frame or not file.tell():
        raise EOFError("it ends too early")


def _parquet_lines(path: str, keys: tuple[str, ...]) -> Iterator[bytes]:
    """Rows of a Parquet file as JSON lines, a batch of rows at a time."""
    import msgspec
    from pyarrow.parquet import ParquetFile

    file = ParquetFile(path)
    binary = _binary_columns(path, file.schema_arrow, keys)
    for batch in file.iter_batches(batch_size=1000, columns=list(keys)):
        lines = []
        for row in batch.to_pylist():
            for key in binary:
                if row[key] is not None:
                    row[key] = _as_json_string(row[key])
            lines.append(msgspec.json.encode(row) + b"\n")
        yield b"".join(lines)


def _binary_columns(path: str, schema, keys: tuple[str, ...]) -> list[str]:
    """Those of the columns that hold bytes. Raises DatasetError for one that is missing, or holds
    neither bytes nor text."""
    from pyarrow import types

    missing = [key for key in keys if key not in schema.names]
    if missing:
        raise DatasetError(
            f"{path}: no column {', '.join(missing)}; it has {', '.join(schema.names)}"
        )
    binary = []
    for key in keys:
        kind = schema.field(key).type
        if types.is_dictionary(kind):
            kind = kind.value_type
        if types.is_binary(kind) or types.is_large_binary(kind):
            binary.append(key)
        elif not (types.is_string(kind) or types.is_large_string(kind) or types.is_null(kind)):
            raise DatasetError(
                f"{path}: column {key} holds {kind}, not text; --json-keys names columns of text"
            )
    return binary


def _as_json_string(value: bytes):
    """A JSON string of exactly these bytes, so that the line is bad where they are not UTF-8."""
    import msgspec

    return msgspec.Raw(msgspec.json.encode(value.decode("latin-1")).decode().encode("latin-1"))


class _ChunkReader(io.RawIOBase):
    """An iterator of byte strings as a file."""

    def __init__(self, chunks: Iterator[bytes]):
        self._chunks = chunks
        self._left = memoryview(b"")

    def readable(self) -> bool:
        """Always true."""
        return True

    def readinto(self, buffer) -> int:
        """Fill the buffer with the rest of a chunk, or the next chunk. Returns 0 at the end."""
        while not self._left:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._left = memoryview(chunk)
        count = min(len(buffer), len(self._left))
        buffer[:count] = self._left[:count]
        self._left = self._left[count:]
        return count


@contextmanager
def _reporting_damage(path: str):
    """Turn whatever a library raises for a damaged file into a DatasetError that names it."""
    try:
        yield
    except DatasetError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the operating system's: says nothing about the content
        # zstandard's and pyarrow's errors have no common parent.
        known = (EOFError, OSError, ValueError, lzma.LZMAError, zlib.error)
        library = type(error).__module__.split(".")[0]
        if isinstance(error, known) or library in ("zstd", "zstandard", "pyarrow"):
            raise DatasetError(
                f"{path}: cannot be read to its end, damaged or cut short ({error})"
            ) from None
        raise
