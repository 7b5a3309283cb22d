"""What a file holds by its first bytes, and whether that is what its name says."""

import re
from pathlib import Path

from megalite.data.indexed import DatasetError
from megalite.preprocess.unpacked import COMPRESSED, missing_library, suffix_of, unpacked

UNSUPPORTED = (".bz2", ".zip", ".lz4", ".7z", ".br", ".z", ".tar", ".tgz", ".lzma", ".zstd")
UNSUPPORTED += (".sz", ".rar")
"""Suffixes of compressed files that are not read."""

HEAD_BYTES = 512
"""Bytes that are enough to recognize every format."""
FORMATS = {
    ".gz": rb"\x1f\x8b",
    ".xz": rb"\xfd7zXZ\0",
    ".zst": rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18",  # or a skippable frame, as of pzstd
    ".bz2": rb"BZh.1AY&SY",  # the fourth byte is a level
    ".parquet": rb"PAR1\x15",
    ".lz4": rb"\x04\x22\x4d\x18",
    ".zip": rb"PK\x03\x04",
    ".7z": rb"7z\xbc\xaf\x27\x1c",
    ".rar": rb"Rar!\x1a\x07",
    ".z": rb"\x1f\x9d",
    ".lzma": rb"\x5d\0\0",
    ".tar": rb".{257}ustar",  # after the name and the times of the first file
}
"""Suffix of a packed file -> a pattern of its first bytes, which no text in UTF-8 has."""
ENCODINGS = {
    "UTF-32": rb"\xff\xfe\0\0|\0\0\xfe\xff",
    "UTF-16": rb"\xff\xfe|\xfe\xff",
    "GB18030": rb"\x84\x31\x95\x33",
    "UTF-32LE": rb"[^\0]\0\0\0",
    "UTF-32BE": rb"\0\0\0[^\0]",
    "UTF-16LE": rb"[^\0]\0[^\0]\0",
    "UTF-16BE": rb"\0[^\0]\0[^\0]",
}
"""Encoding -> a pattern of the first bytes of a text: a byte order mark, or without one the zeros
of ASCII characters. The longer marks come first."""


def file_problem(path: str) -> str | None:
    """How the content of an input file differs from what its name says, None if it does not.

    Recognizes formats in which text is packed, and encodings other than UTF-8, inside a compressed
    file too. A damaged file is left to its reader.
    """
    named = suffix_of(path)
    known = ", ".join(COMPRESSED)
    if named in UNSUPPORTED:
        return (
            f"{named} is no known kind of compression: convert it to one of {known}, or unpack it"
        )
    try:
        with open(path, "rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if not head.strip(b"\0"):
        return None
    # The outer format is the one that the suffix names.
    if named not in (*COMPRESSED, ".parquet"):
        named = ""
    found = _recognize(FORMATS, head)
    if found != named:
        return _wrong_suffix(path, named, found, head)
    if named == ".parquet" or missing_library(named):
        return None
    if not named:
        return _encoding_problem(head)
    # Inside a compressed file is text in UTF-8.
    try:
        with unpacked(path, ()) as file:
            head = file.read(HEAD_BYTES)
    except (DatasetError, OSError):
        return None
    if inner := _recognize(FORMATS, head):
        return f"holds {inner} data inside {named}; unpack it once"
    return _encoding_problem(head)


def stream_problem(head: bytes) -> str | None:
    """What is wrong with a stream that should be text in UTF-8, by its first bytes; None:
    nothing."""
    if found := _recognize(FORMATS, head):
        return f"holds {found} data, not text; unpack it first, for example with zcat or zstdcat"
    return _encoding_problem(head)


def _wrong_suffix(path: str, named: str, found: str, head: bytes) -> str:
    is_text = _encoding_problem(head) or not re.search(rb"[^\t\n\f\r\x20-\xff]", head)
    if not found and is_text:
        other = Path(path).with_suffix("")
        return f"named {named}, but it holds plain text; rename it, for example to {other}"
    if not found:
        return f"named {named}, but it does not start as {named} data does; damaged, or misnamed"
    problem = f"holds {found} data, which its name does not say"
    if found == ".parquet":
        return f"{problem}; rename it to {Path(path).with_suffix(found)}"
    if found in COMPRESSED:
        stem = Path(path).with_suffix("") if named else path
        return f"{problem}; rename it to {stem}{found}"
    return f"{problem}; unpack it, or convert it to one of {', '.join(COMPRESSED)}"


def _recognize(kinds: dict[str, bytes], head: bytes) -> str:
    """The first of FORMATS or ENCODINGS whose pattern is at the beginning of `head`, "" if none."""
    for name, pattern in kinds.items():
        if re.match(pattern, head, re.DOTALL):
            return name
    return ""


def _encoding_problem(head: bytes) -> str | None:
    encoding = _recognize(ENCODINGS, head)
    if not encoding:
        return None
    command = f"iconv -f {encoding} -t UTF-8 FILE > NEW_FILE"
    return f"encoded in {encoding}; convert it to UTF-8: {command}"
