"""Files that must be read from their beginning, as streams of JSON lines or text: compressed ones, Parquet."""

import io
import lzma
import zlib
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from megalite.data.indexed import DatasetError

COMPRESSED = (".gz", ".xz", ".zst")
LIBRARIES = {".zst": "zstandard", ".parquet": "pyarrow"}
"""Libraries that not every installation has, by the suffix of the files that need them."""
BUFFER_BYTES, COMPRESSED_BYTES = 1 << 20, 1 << 16
"""Bytes that are held unpacked, and that are unpacked at a time."""


@contextmanager
def unpacked(path: str, keys: tuple[str, ...]):
    """The content of a compressed file, or the rows of a Parquet file as JSON lines, as a binary file.

    Raises DatasetError for a damaged file, and for one that ends too early or lacks one of the columns `keys`.
    """
    with _explaining_damage(path):
        if Path(path).suffix == ".parquet":
            yield io.BufferedReader(_ParquetLines(path, keys), BUFFER_BYTES)
        else:
            with open(path, "rb") as file:
                yield io.BufferedReader(_Decompressed(file, Path(path).suffix), BUFFER_BYTES)


def _decompressor(suffix: str):
    """A new decompressor of one frame, member or stream: they all have decompress, eof and unused_data."""
    if suffix == ".gz":
        return zlib.decompressobj(wbits=31)
    if suffix == ".xz":
        return lzma.LZMADecompressor(lzma.FORMAT_XZ)
    import zstandard

    return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()  # as zstd --long=31 makes them


class _Decompressed(io.RawIOBase):
    """The content of a compressed file of any number of frames. Raises EOFError where the last one is cut short."""

    def __init__(self, file: BinaryIO, suffix: str):
        self._file, self._suffix = file, suffix
        self._frame, self._compressed, self._left = None, b"", b""

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer) -> int:
        """Fill the buffer with what is left of a piece, or with the next one."""
        while not self._left:
            data, self._compressed = self._compressed or self._file.read(COMPRESSED_BYTES), b""
            if not data:
                if self._frame or not self._file.tell():
                    raise EOFError("it ends too early")
                return 0
            if self._frame is None:
                data = data.lstrip(b"\0")  # which may pad a frame
                if not data:
                    continue
                self._frame = _decompressor(self._suffix)
            self._left = self._frame.decompress(data)
            if self._frame.eof:
                self._frame, self._compressed = None, self._frame.unused_data
        count = min(len(buffer), len(self._left))
        buffer[:count], self._left = self._left[:count], self._left[count:]
        return count


class _ParquetLines(io.RawIOBase):
    """Rows of a Parquet file as JSON lines, a batch of rows at a time."""

    def __init__(self, path: str, keys: tuple[str, ...]):
        from pyarrow.parquet import ParquetFile

        file = ParquetFile(path)
        missing = [key for key in keys if key not in file.schema_arrow.names]
        if missing:
            raise DatasetError(f"{path}: no column {', '.join(missing)}; it has {', '.join(file.schema_arrow.names)}")
        self._batches = file.iter_batches(batch_size=1000, columns=list(keys))
        self._left = b""

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer) -> int:
        """Fill the buffer with what is left of a batch, or with the next one."""
        import msgspec

        while not self._left:
            batch = next(self._batches, None)
            if batch is None:
                return 0
            self._left = b"".join(msgspec.json.encode(row) + b"\n" for row in batch.to_pylist())
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
        raise DatasetError(f"{path}: cannot be read to its end, damaged or cut short ({error})") from None
    except Exception as error:  # zstandard's and pyarrow's have no common parent
        if type(error).__module__.split(".")[0] in ("zstd", "zstandard", "pyarrow"):
            raise DatasetError(f"{path}: cannot be read to its end, damaged or cut short ({error})") from None
        raise
