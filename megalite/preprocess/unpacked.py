"""Files that must be read from their beginning, as streams of JSON lines or text: compressed ones, Parquet."""

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
"""Libraries that not every installation has, by the suffix of the files that need them."""
UNKNOWN = (
    ".bz2",
    ".zip",
    ".lz4",
    ".7z",
    ".br",
    ".z",
    ".tar",
    ".tgz",
    ".lzma",
    ".zstd",
    ".sz",
    ".rar",
)
"""Suffixes of compressed files that are not read."""
BUFFER_BYTES, COMPRESSED_BYTES = 1 << 20, 1 << 16
"""Bytes that are held unpacked, and that are unpacked at a time."""


def suffix_of(path: str | Path) -> str:
    """The suffix of a file's name, in small letters."""
    return Path(path).suffix.lower()


@contextmanager
def unpacked(path: str, keys: tuple[str, ...]):
    """The content of a compressed file, or the rows of a Parquet file as JSON lines, as a binary file.

    Raises DatasetError for a damaged file, and for one that ends too early or lacks one of the columns `keys`.
    """
    with _explaining_damage(path):
        if suffix_of(path) == ".parquet":
            yield io.BufferedReader(_Stream(_parquet_lines(path, keys)), BUFFER_BYTES)
        else:
            with open(path, "rb") as file:
                yield io.BufferedReader(_Stream(_decompressed(file, suffix_of(path))), BUFFER_BYTES)


def _decompressor(suffix: str):
    """A new decompressor of one frame, member or stream: they all have decompress, eof and unused_data."""
    if suffix == ".gz":
        return zlib.decompressobj(wbits=31)
    if suffix == ".xz":
        return lzma.LZMADecompressor(lzma.FORMAT_XZ)
    import zstandard

    return zstandard.ZstdDecompressor(
        max_window_size=1 << 31
    ).decompressobj()  # as zstd --long=31 makes them


def _decompressed(file: BinaryIO, suffix: str) -> Iterator[bytes]:
    """The content of a compressed file of any number of frames. Raises EOFError where the last one is cut short."""
    frame, data = None, b""
    while data or (data := file.read(COMPRESSED_BYTES)):
        if frame is None:
            data = data.lstrip(b"\0")  # zeros may pad a frame
            if not data:
                continue
            frame = _decompressor(suffix)
        yield frame.decompress(data)
        data = b""
        if frame.eof:
            frame, data = None, frame.unused_data
    if frame or not file.tell():
        raise EOFError("it ends too early")


def _parquet_lines(path: str, keys: tuple[str, ...]) -> Iterator[bytes]:
    """Rows of a Parquet file as JSON lines, a batch of rows at a time."""
    import msgspec
    from pyarrow import types
    from pyarrow.parquet import ParquetFile

    file = ParquetFile(path)
    missing = [key for key in keys if key not in file.schema_arrow.names]
    if missing:
        raise DatasetError(
            f"{path}: no column {', '.join(missing)}; it has {', '.join(file.schema_arrow.names)}"
        )
    kinds = {key: file.schema_arrow.field(key).type for key in keys}
    kinds = {
        key: kind.value_type if types.is_dictionary(kind) else kind for key, kind in kinds.items()
    }
    binary = {
        key for key, kind in kinds.items() if types.is_binary(kind) or types.is_large_binary(kind)
    }
    for key in kinds.keys() - binary:
        if not (
            types.is_string(kinds[key])
            or types.is_large_string(kinds[key])
            or types.is_null(kinds[key])
        ):
            raise DatasetError(
                f"{path}: column {key} holds {kinds[key]}, not text; --json-keys names columns of text"
            )
    for batch in file.iter_batches(batch_size=1000, columns=list(keys)):
        rows = batch.to_pylist()
        for row in rows if binary else ():
            row |= {key: _as_text(row[key]) for key in binary if row[key] is not None}
        yield b"".join(msgspec.json.encode(row) + b"\n" for row in rows)


def _as_text(value: bytes):
    """Bytes as a JSON string of the same bytes, so that what is not UTF-8 is a bad line."""
    import msgspec

    return msgspec.Raw(msgspec.json.encode(value.decode("latin-1")).decode().encode("latin-1"))


class _Stream(io.RawIOBase):
    """Pieces of bytes as a file."""

    def __init__(self, pieces: Iterator[bytes]):
        self._pieces, self._left = pieces, memoryview(b"")

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer) -> int:
        """Fill the buffer with what is left of a piece, or with the next one."""
        while not self._left:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._left = memoryview(piece)
        count = min(len(buffer), len(self._left))
        buffer[:count], self._left = self._left[:count], self._left[count:]
        return count


@contextmanager
def _explaining_damage(path: str):
    try:
        yield
    except DatasetError:
        raise
    except (EOFError, OSError, ValueError, lzma.LZMAError, zlib.error) as error:
        raise DatasetError(
            f"{path}: cannot be read to its end, damaged or cut short ({error})"
        ) from None
    except Exception as error:  # zstandard's and pyarrow's have no common parent
        if type(error).__module__.split(".")[0] in ("zstd", "zstandard", "pyarrow"):
            raise DatasetError(
                f"{path}: cannot be read to its end, damaged or cut short ({error})"
            ) from None
        raise
