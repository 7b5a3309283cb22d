"""What a file holds by its first bytes, and whether that is what its name says."""

from pathlib import Path

from megalite.data.indexed import DatasetError
from megalite.preprocess.unpacked import COMPRESSED, has_library, suffix_of, unpacked

HEAD_BYTES = 512
"""Bytes that are enough to recognize every format."""
SIGNATURES = {
    b"\x1f\x8b": ".gz",
    b"\xfd7zXZ\0": ".xz",
    b"\x28\xb5\x2f\xfd": ".zst",
    b"PAR1\x15": ".parquet",
    b"\x04\x22\x4d\x18": ".lz4",
    b"PK\x03\x04": ".zip",
    b"7z\xbc\xaf\x27\x1c": ".7z",
    b"Rar!\x1a\x07": ".rar",
    b"\x1f\x9d": ".z",
    b"\x5d\0\0": ".lzma",
}
"""First bytes of a file -> the suffix that says so. No text in UTF-8 starts with any of them."""
BYTE_ORDER_MARKS = {
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
    b"\x84\x31\x95\x33": "GB18030",
}
"""First bytes of a text -> its encoding, the longer marks first."""
ZERO_BYTES = {
    (False, True, True, True): "UTF-32LE",
    (True, True, True, False): "UTF-32BE",
    (False, True, False, True): "UTF-16LE",
    (True, False, True, False): "UTF-16BE",
}
"""Which of a text's first four bytes are zero, when they are ASCII characters without a mark."""


def file_problem(path: str) -> str | None:
    """How the content of an input file differs from what its name says, None if it does not.

    Recognizes formats in which text is packed, and encodings other than UTF-8, inside a compressed
    file too. A damaged file is left to its reader.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if not head.strip(b"\0"):
        return None
    # The outer format is the one that the suffix names.
    named = suffix_of(path)
    if named not in (*COMPRESSED, ".parquet"):
        named = ""
    found = _format_of(head)
    if found != named:
        return _wrong_suffix(path, named, found, head)
    if named == ".parquet" or not has_library(named):
        return None
    if not named:
        return _encoding_problem(head)
    # Inside a compressed file is text in UTF-8.
    try:
        with unpacked(path, ()) as file:
            head = file.read(HEAD_BYTES)
    except (DatasetError, OSError):
        return None
    inner = _format_of(head)
    if inner:
        return f"holds {inner} data inside {named}; unpack it once"
    return _encoding_problem(head)


def stream_problem(head: bytes) -> str | None:
    """What is wrong with a stream that should be text in UTF-8, by its first bytes; None:
    nothing."""
    found = _format_of(head)
    if found:
        return f"holds {found} data, not text; unpack it first, for example with zcat or zstdcat"
    return _encoding_problem(head)


def _wrong_suffix(path: str, named: str, found: str, head: bytes) -> str:
    if not found and _is_text(head):
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


def _format_of(head: bytes) -> str:
    """The suffix of the packed format that starts with these bytes, "" if none is known."""
    for signature, suffix in SIGNATURES.items():
        if head.startswith(signature):
            return suffix
    # The fourth byte of bzip2 is a level; tar has its mark after the first file's name and times.
    if head[:3] == b"BZh" and head[4:10] == b"1AY&SY":
        return ".bz2"
    if head[257:262] == b"ustar":
        return ".tar"
    # A zstd file may start with a skippable frame, as pzstd writes them.
    if head[1:4] == b"\x2a\x4d\x18" and head[0] >> 4 == 5:
        return ".zst"
    return ""


def _encoding_problem(head: bytes) -> str | None:
    encoding = ZERO_BYTES.get(tuple(byte == 0 for byte in head[:4]))
    for mark, name in BYTE_ORDER_MARKS.items():
        if head.startswith(mark):
            encoding = name
            break
    if encoding is None:
        return None
    command = f"iconv -f {encoding} -t UTF-8 FILE > NEW_FILE"
    return f"encoded in {encoding}; convert it to UTF-8: {command}"


def _is_text(head: bytes) -> bool:
    """Whether bytes look like text: no control characters but white space, or a known encoding."""
    return _encoding_problem(head) is not None or all(
        byte >= 32 or byte in b"\t\n\f\r" for byte in head
    )
