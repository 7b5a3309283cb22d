"""Compressed files and Parquet, which must be read from their beginning, as streams."""

import importlib.util
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from megalite.data.indexed import DatasetError

COMPRESSED = (".gz", ".xz", ".zst")
LIBRARIES = {".zst": "zstandard", ".parquet": "pyarrow"}
"""Optional libraries, by the suffix of the files that need them."""
BUFFER_BYTES = 1 << 20
"""Bytes of uncompressed content that are buffered."""
COMPRESSED_BYTES = 1 << 16
"""Bytes of a compressed file that are unpacked at a time."""


def suffix_of(path: str | Path) -> str:
    """The suffix of a file's name, in small letters."""
    return Path(path).suffix.lower()


def missing_library(suffix: str) -> str | None:
    """The library that files of this suffix need, None if they need none or it is installed."""
    library = LIBRARIES.get(suffix)
    return library if library and importlib.util.find_spec(library) is None else None


@contextmanager
def unpacked(path: str, keys: tuple[str, ...]):
    """A binary file of the content of a compressed file, or of a Parquet file's rows as JSON lines.

    Raises DatasetError for a damaged file, and for one that is cut short or lacks one of the
    columns `keys`.
    """
    parquet = suffix_of(path) == ".parquet"
    chunks = _parquet_lines(path, keys) if parquet else _decompressed(path)
    try:
        yield io.BufferedReader(_ChunkReader(chunks), BUFFER_BYTES)
    except DatasetError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the operating system's: says nothing about the content
        # zstandard's and pyarrow's errors have no common parent.
        known = (EOFError, OSError, ValueError, lzma.LZMAError, zlib.error)
        library = type(error).__module__.split(".")[0]
        if not isinstance(error, known) and library not in ("zstd", "zstandard", "pyarrow"):
            raise
        raise DatasetError(
            f"{path}: cannot be read to its end, damaged or cut short ({error})"
        ) from None
    finally:
        chunks.close()


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


def _decompressed(path: str) -> Iterator[bytes]:
    """The content of a compressed file of any number of frames.

    Raises EOFError where the last frame is cut short.
    """
    frame = None
    data = b""
    with open(path, "rb") as file:
        while data or (data := file.read(COMPRESSED_BYTES)):
            if frame is None:
                data = data.lstrip(b"\0")  # zeros may pad a frame
                if not data:
                    continue
                frame = _decompressor(suffix_of(path))
            yield frame.decompress(data)
            data = b""
            if frame.eof:
                data = frame.unused_data
                frame = None
        if frame or not file.tell():
            raise EOFError("it ends too early")


def _parquet_lines(path: str, keys: tuple[str, ...]) -> Iterator[bytes]:
    """Rows of a Parquet file as JSON lines, a batch of rows at a time."""
    from pyarrow.parquet import ParquetFile

    file = ParquetFile(path)
    binary = _binary_columns(path, file.schema_arrow, keys)
    encode = msgspec.json.encode
    for batch in file.iter_batches(batch_size=1000, columns=list(keys)):
        rows = batch.to_pylist()
        for row in rows:
            for key in binary:
                if row[key] is not None:
                    # A JSON string of the same bytes: the line is bad where they are not UTF-8.
                    string = encode(row[key].decode("latin-1")).decode().encode("latin-1")
                    row[key] = msgspec.Raw(string)
        yield b"".join(encode(row) + b"\n" for row in rows)


def _binary_columns(path: str, schema, keys: tuple[str, ...]) -> list[str]:
    """Those of the columns that hold bytes. Raises DatasetError for one that is missing, or holds
    neither bytes nor text."""
    from pyarrow.types import is_dictionary

    missing = [key for key in keys if key not in schema.names]
    if missing:
        raise DatasetError(
            f"{path}: no column {', '.join(missing)}; it has {', '.join(schema.names)}"
        )
    binary = []
    for key in keys:
        kind = schema.field(key).type
        if is_dictionary(kind):
            kind = kind.value_type
        if str(kind) in ("binary", "large_binary"):
            binary.append(key)
        elif str(kind) not in ("string", "large_string", "null"):
            raise DatasetError(
                f"{path}: column {key} holds {kind}, not text; --json-keys names columns of text"
            )
    return binary


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
