"""Input of preprocessing in blocks of JSON lines: JSONL, plain or compressed, text, Parquet, standard input.

A block of a plain file is a range of bytes, which whoever encodes it reads; blocks of everything else carry lines.
"""

import glob
import importlib.util
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import BinaryIO, NamedTuple

from megalite.preprocess.unpacked import COMPRESSED, LIBRARIES, UNKNOWN, suffix_of, unpacked

BLOCK_BYTES = 1 << 20
"""Whole lines of about this size are encoded at a time."""
STDIN = "-"
SUFFIXES = (".jsonl", ".ndjson", ".json", ".txt", ".parquet")
"""Of the files that are taken from a folder, compressed or not."""


class Block(NamedTuple):
    """Whole lines of one file, or one text file."""

    file: int
    """Place of the file in the list of inputs."""
    path: str
    start: int
    """Byte, of the uncompressed lines, at which the block starts."""
    stop: int
    """Byte at which it ends."""
    data: bytes | None
    """The lines; None: bytes [start, stop) of the file."""
    is_text: bool
    """Whether this is one document as it stands, not JSON lines."""

    def read(self) -> bytes:
        """The bytes of the block."""
        if self.data is not None:
            return self.data
        with open(self.path, "rb") as file:
            file.seek(self.start)
            return file.read(self.stop - self.start)


def shown(path: str) -> str:
    """How a message names an input."""
    return "standard input" if path == STDIN else path


def kind_of(path: str) -> str:
    """ "stdin", "text", "parquet", "compressed" or "plain"."""
    suffix = suffix_of(path)
    if path == STDIN:
        return "stdin"
    return {".txt": "text", ".parquet": "parquet"}.get(suffix) or (
        "compressed" if suffix in COMPRESSED else "plain"
    )


def is_text(path: str) -> bool:
    """Whether a file is one document as it stands."""
    return suffix_of(_uncompressed(path)) == ".txt"


def _uncompressed(path: str) -> str:
    """The name of a file without the suffix of its compression."""
    return str(Path(path).with_suffix("")) if suffix_of(path) in COMPRESSED else path


def expand(inputs: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """(files, problems): files as they are, patterns and folders as the files in them, sorted by name.

    Of a folder, sub-folders are taken too, and only the kinds of files that are known: see `left_out`.
    """
    files, problems = [], [] if inputs else ["--input: give at least one file, folder or pattern"]
    for name in inputs:
        if name == STDIN or os.path.isfile(name):
            found = [name]
        elif os.path.isdir(name):
            found = [path for path in _files_in(name) if _is_input(path)]
            if not found:
                problems.append(f"--input {name}: a folder without {', '.join(SUFFIXES)} files")
        elif glob.has_magic(name):
            found = sorted(path for path in glob.glob(name, recursive=True) if os.path.isfile(path))
            if not found:
                problems.append(f"--input {name}: no file has such a name")
        else:
            found = []
            piped = "not a file; pipe what it gives to --input -"
            problems.append(f"--input {name}: {piped if os.path.exists(name) else 'no such file'}")
        files += found
    problems += [
        f"--input {path}: not readable"
        for path in files
        if path != STDIN and not os.access(path, os.R_OK)
    ]
    problems += [f"--input {path}: given twice" for path in _repeated(files)]
    known = f"no known kind of compression: make it one of {', '.join(COMPRESSED)}, or unpack it"
    problems += [
        f"--input {path}: {suffix_of(path)} is {known}"
        for path in files
        if suffix_of(path) in UNKNOWN
    ]
    for suffix in sorted({suffix_of(path) for path in files} & LIBRARIES.keys()):
        if importlib.util.find_spec(LIBRARIES[suffix]) is None:
            problems.append(
                f"--input: {suffix} files need the {LIBRARIES[suffix]} library: pip install {LIBRARIES[suffix]}"
            )
    return files, problems


def left_out(inputs: Iterable[str]) -> list[str]:
    """Files in folders among the inputs that are of no known kind, and so are not read."""
    return [
        path
        for name in inputs
        if os.path.isdir(name)
        for path in _files_in(name)
        if not _is_input(path)
    ]


def _repeated(files: list[str]) -> list[str]:
    """The first names of files that are there several times, under whatever names."""
    first: dict[str, str] = {}
    counts = Counter(first.setdefault(os.path.realpath(path), path) for path in files)
    return sorted(name for name, count in counts.items() if count > 1)


def _files_in(folder: str) -> list[str]:
    """Every file in a folder and its sub-folders, sorted; hidden ones are none."""
    found = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [os.path.join(parent, name) for name in names if not name.startswith(".")]
    return sorted(path for path in found if os.path.isfile(path))


def _is_input(path: str) -> bool:
    return suffix_of(_uncompressed(path)) in SUFFIXES


def sizes_of(files: list[str]) -> list[int]:
    """Bytes of each file; 0 for standard input."""
    return [0 if path == STDIN else os.path.getsize(path) for path in files]


def shard_ranges(files: list[str], shard: int, shards: int) -> list[tuple[int, int, int]]:
    """(file, start, stop) of the bytes in shard number `shard` of `shards` equal ones of all files together.

    Plain files are cut at line ends; other files belong whole to the shard that their first byte is in.
    """
    sizes = sizes_of(files)
    total, base, ranges = sum(sizes), 0, []
    low, high = total * shard // shards, total * (shard + 1) // shards
    for number, (path, size) in enumerate(zip(files, sizes)):
        first, last = max(low - base, 0), min(high - base, size)
        if kind_of(path) == "plain":
            if first < last:
                start, stop = _line_start(path, first, size), _line_start(path, last, size)
                if start < stop:
                    ranges.append((number, start, stop))
        elif low <= base < high or (size == 0 and shard == 0):
            ranges.append((number, 0, sys.maxsize))
        base += size
    return ranges


def _line_start(path: str, target: int, size: int) -> int:
    """The first byte >= target at which a line starts, or the size."""
    if target in (0, size):
        return target
    with open(path, "rb") as file:
        file.seek(target - 1)
        file.readline()
        return file.tell()


def count_lines(path: str, stop: int) -> int:
    """Line ends in the first `stop` bytes of a file."""
    count = 0
    with open(path, "rb") as file:
        while stop > 0 and (data := file.read(min(BLOCK_BYTES, stop))):
            count, stop = count + data.count(b"\n"), stop - len(data)
    return count


def read_blocks(
    files: list[str], ranges: list[tuple[int, int, int]], keys: tuple[str, ...], after=(0, 0)
) -> Iterator[Block]:
    """The blocks of these ranges, from position `after` = (file, byte) on. Raises DatasetError for a damaged file."""
    for number, first, last in ranges:
        if number < after[0]:
            continue
        start = max(first, after[1]) if number == after[0] else first
        path, kind = files[number], kind_of(files[number])
        if kind == "plain":
            yield from _plain_blocks(number, path, start, last)
        elif kind == "text":
            size = os.path.getsize(path)
            if start < max(size, 1):
                yield Block(number, path, 0, max(size, 1), None, True)
        else:
            with nullcontext(sys.stdin.buffer) if kind == "stdin" else unpacked(path, keys) as file:
                if not is_text(path):
                    yield from _streamed_blocks(number, shown(path), file, start)
                elif start == 0:
                    data = file.read()
                    yield Block(number, path, 0, max(len(data), 1), data, True)


def _plain_blocks(number: int, path: str, start: int, last: int) -> Iterator[Block]:
    with open(path, "rb") as file:
        while start < last:
            stop = start + BLOCK_BYTES
            if stop < last:
                file.seek(stop - 1)
                file.readline()
                stop = file.tell()
            yield Block(number, path, start, min(stop, last), None, False)
            start = stop


def _streamed_blocks(number: int, path: str, file: BinaryIO, after: int) -> Iterator[Block]:
    start = 0
    while start < after and (skipped := file.read(min(BLOCK_BYTES, after - start))):
        start += len(skipped)
    while data := file.read(BLOCK_BYTES):
        if not data.endswith(b"\n"):
            data += file.readline()
        yield Block(number, path, start, start + len(data), data, False)
        start += len(data)
