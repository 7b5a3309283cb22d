"""Inputs of preprocessing, in blocks: JSONL, plain or compressed, text, Parquet, standard input.

A block of a plain file is a range of bytes, which the worker that encodes it reads. A block of any
other file carries its lines.
"""

import fnmatch
import glob
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import BinaryIO, NamedTuple

from megalite.data.indexed import DatasetError
from megalite.preprocess.content import HEAD_BYTES, file_problem, stream_problem
from megalite.preprocess.unpacked import COMPRESSED, missing_library, suffix_of, unpacked

BLOCK_BYTES = 1 << 20
"""Approximate size of a block, which ends at the end of a line."""
STDIN = "-"
SUFFIXES = (".jsonl", ".ndjson", ".json", ".txt", ".parquet")
"""Suffixes of the files that are taken from a folder, compressed or not."""
Ranges = list[tuple[int, int, int]]
"""(index of the file in the list of inputs, first byte, byte after the last) of each range."""


class Block(NamedTuple):
    """Whole lines of one file, or one text file."""

    file: int
    """Index of the file in the list of inputs."""
    path: str
    start: int
    """Offset, in the uncompressed content, of the block's first byte."""
    stop: int
    """Offset of the byte after its last."""
    data: bytes | None
    """The lines; None: bytes [start, stop) of the file."""
    is_text: bool
    """Whether the block is one document as it stands, not JSON lines."""

    def read(self) -> bytes:
        """The bytes of the block."""
        if self.data is not None:
            return self.data
        with open(self.path, "rb") as file:
            file.seek(self.start)
            return file.read(self.stop - self.start)


def display_name(path: str) -> str:
    """The name of an input in messages."""
    return "standard input" if path == STDIN else path


def kind_of(path: str) -> str:
    """How an input is read: "stdin", "text", "parquet", "compressed" or "plain"."""
    if path == STDIN:
        return "stdin"
    suffix = suffix_of(path)
    if suffix in COMPRESSED:
        return "compressed"
    return {".txt": "text", ".parquet": "parquet"}.get(suffix, "plain")


def is_text(path: str) -> bool:
    """Whether a file is one document as it stands."""
    return _inner_suffix(path) == ".txt"


def _inner_suffix(path: str) -> str:
    """The suffix of a file's name without that of its compression."""
    name = Path(path)
    return suffix_of(name.with_suffix("") if suffix_of(name) in COMPRESSED else name)


def input_files(inputs: tuple[str, ...]) -> list[str]:
    """The files that `expand` finds. Raises DatasetError with its problems."""
    files, problems = expand(inputs)
    if problems:
        raise DatasetError("; ".join(problems))
    return files


def expand(inputs: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """(files, problems) of the arguments of --input.

    A file stands for itself, a pattern for the files that match it, and a folder for the files of
    known kinds in it and its sub-folders (see `ignored_files`); both sorted by name.
    """
    files: list[str] = []
    problems: list[str] = []
    if not inputs:
        problems.append("--input: give at least one file, folder or pattern")
    # Find the files of each argument.
    for name in inputs:
        found, problem = _find_files(name)
        files += found
        if problem:
            problems.append(f"--input {name}: {problem}")
    # Check each file: readable, and holding what its name says.
    for path in files:
        if path != STDIN and (problem := file_problem(path)):
            problems.append(f"--input {path}: {problem}")
    # Check them together: each once, and all libraries installed.
    problems += [f"--input {path}: given twice" for path in _repeated(files)]
    for suffix in sorted(set(map(suffix_of, files))):
        if library := missing_library(suffix):
            problems.append(
                f"--input: {suffix} files need the {library} library: pip install {library}"
            )
    return files, problems


def _find_files(name: str) -> tuple[list[str], str]:
    """The files that one argument of --input stands for, and what is wrong if there are none."""
    if name == STDIN or os.path.isfile(name):
        return [name], ""
    if os.path.isdir(name):
        found = [path for path in _files_in(name) if _inner_suffix(path) in SUFFIXES]
        return found, "" if found else f"a folder without {', '.join(SUFFIXES)} files"
    if glob.has_magic(name):
        found = _files_matching(name)
        return found, "" if found else "no file has such a name"
    if os.path.exists(name):
        return [], "not a file; pipe its output to --input -"
    return [], "no such file"


def ignored_files(inputs: Iterable[str]) -> list[str]:
    """Files in the input folders that are of no known kind, and so are not read."""
    ignored = []
    for folder in filter(os.path.isdir, inputs):
        ignored += [path for path in _files_in(folder) if _inner_suffix(path) not in SUFFIXES]
    return ignored


def _repeated(files: list[str]) -> list[str]:
    """The first name of each file that is there several times, under any names."""
    first: dict[str, str] = {}
    counts = Counter(first.setdefault(os.path.realpath(path), path) for path in files)
    return sorted(path for path, count in counts.items() if count > 1)


def _files_in(folder: str) -> list[str]:
    """Every file in a folder and its sub-folders, sorted, except hidden ones.

    Links to folders are followed, but each real folder is visited once: a link to a folder around
    it would otherwise repeat its files until the operating system gives up.
    """
    found = []
    visited = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [os.path.join(parent, name) for name in names if not name.startswith(".")]
    return sorted(filter(os.path.isfile, found))


def _files_matching(pattern: str) -> list[str]:
    """Every file that matches a pattern, sorted; ** stands for any number of sub-folders."""
    names = pattern.split(os.sep)
    if "**" not in names:
        return sorted(filter(os.path.isfile, glob.glob(pattern)))
    # glob would follow a link to a folder around it again and again: `_files_in` does not.
    first = names.index("**")
    root = os.sep.join([*names[:first], ""])
    found = []
    for folder in glob.glob(root) if root else [""]:
        for path in _files_in(folder or "."):
            relative = os.path.relpath(path, folder or ".")
            if _matches(relative.split(os.sep), names[first:]):
                found.append(os.path.join(folder, relative))
    return sorted(found)


def _matches(names: list[str], patterns: list[str]) -> bool:
    """Whether the names of a path match a pattern's, of which ** matches any number."""
    if not names or not patterns:
        return not names and set(patterns) <= {"**"}
    if patterns[0] == "**":
        return _matches(names[1:], patterns) or _matches(names, patterns[1:])
    return fnmatch.fnmatchcase(names[0], patterns[0]) and _matches(names[1:], patterns[1:])


def sizes_of(files: list[str]) -> list[int]:
    """Bytes of each file; 0 for standard input."""
    return [0 if path == STDIN else os.path.getsize(path) for path in files]


def shard_ranges(files: list[str], shard: int = 0, shards: int = 1) -> Ranges:
    """The byte ranges of shard number `shard` of `shards`.

    All files together are divided into shards of equal size. Plain files are cut at line ends;
    any other file belongs whole to the shard that its first byte is in.
    """
    sizes = sizes_of(files)
    total = sum(sizes)
    low = total * shard // shards
    high = total * (shard + 1) // shards
    base = 0
    ranges = []
    for number, (path, size) in enumerate(zip(files, sizes)):
        if kind_of(path) == "plain":
            start = _line_start(path, low - base, size)
            stop = _line_start(path, high - base, size)
            if start < stop:
                ranges.append((number, start, stop))
        elif low <= base < high or (size == 0 and shard == 0):
            ranges.append((number, 0, sys.maxsize))
        base += size
    return ranges


def _line_start(path: str, target: int, size: int) -> int:
    """The first byte >= target at which a line starts, between 0 and the size."""
    if not 0 < target < size:
        return min(max(target, 0), size)
    with open(path, "rb") as file:
        file.seek(target - 1)
        file.readline()
        return file.tell()


def count_lines(path: str, stop: int) -> int:
    """Line ends in the first `stop` bytes of a file."""
    count = 0
    with open(path, "rb") as file:
        while stop > 0 and (data := file.read(min(BLOCK_BYTES, stop))):
            count += data.count(b"\n")
            stop -= len(data)
    return count


def read_blocks(
    files: list[str], ranges: Ranges, keys: tuple[str, ...], position=(0, 0)
) -> Iterator[Block]:
    """The blocks of these ranges, from a position (file, byte) on, where a block ended before.

    Raises DatasetError for a damaged file, and for standard input that is not UTF-8 text.
    """
    for number, first, last in ranges:
        if number < position[0]:
            continue
        start = max(first, position[1]) if number == position[0] else first
        path = files[number]
        kind = kind_of(path)
        if kind == "plain":
            yield from _plain_blocks(number, path, start, last)
        elif kind == "text":
            size = os.path.getsize(path)
            if start < max(size, 1):
                yield Block(number, path, 0, max(size, 1), None, is_text=True)
        else:
            with nullcontext(sys.stdin.buffer) if kind == "stdin" else unpacked(path, keys) as file:
                if not is_text(path):
                    yield from _streamed_blocks(number, path, file, start)
                elif start == 0:
                    data = file.read()
                    yield Block(number, path, 0, max(len(data), 1), data, is_text=True)


def _plain_blocks(number: int, path: str, start: int, last: int) -> Iterator[Block]:
    with open(path, "rb") as file:
        while start < last:
            stop = start + BLOCK_BYTES
            if stop < last:
                file.seek(stop - 1)
                file.readline()
                stop = file.tell()
            yield Block(number, path, start, min(stop, last), None, is_text=False)
            start = stop


def _streamed_blocks(number: int, path: str, file: BinaryIO, position: int) -> Iterator[Block]:
    path = display_name(path)
    start = 0
    while start < position and (skipped := file.read(min(BLOCK_BYTES, position - start))):
        start += len(skipped)
    while data := file.read(BLOCK_BYTES):
        if not data.endswith(b"\n"):
            data += file.readline()
        if start == 0 and (problem := stream_problem(data[:HEAD_BYTES])):
            raise DatasetError(f"{path}: {problem}")
        yield Block(number, path, start, start + len(data), data, is_text=False)
        start += len(data)
