"""The files of an indexed dataset.

The .bin file holds the token arrays one after another. The .idx file, little-endian, holds

    9 bytes      MMIDIDX and two zero bytes
    u64          version, 1
    u8           dtype code
    u64, u64     number of sequences n, number of document boundaries d + 1
    n int32      lengths in tokens
    n int64      byte offsets into .bin
    d + 1 int64  first sequence of each document, then n
    n int8       modes, optional and not read

PREFIX.json beside them tells which tokenizer made the ids.
"""

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
"""Dtype code in the .idx file -> NumPy dtype of the .bin file."""
CHUNK = 1 << 20
"""Index entries looked at or copied at a time: memory stays small however many sequences there are."""
REMAKE = "Make it again with tools/preprocess_data.py"


class DatasetError(ValueError):
    """Data that cannot be used: names the file or split, the value found, and what to do."""


@dataclass(frozen=True)
class DatasetInfo:
    """What PREFIX.json says of an indexed dataset: its tokenizer and its size."""

    tokenizer_type: str
    vocab_size: int
    """Every id in the data is below this."""
    eod: int | None
    """Id of the end-of-document token; None when the tokenizer has none."""
    tokenizer_sha256: str
    """Digest of the tokenizer's model, to tell two tokenizers of one type apart."""
    documents: int
    tokens: int

    @classmethod
    def read(cls, prefix: str | Path) -> "DatasetInfo | None":
        """The description beside the dataset at `prefix`, None when there is none. Raises DatasetError if damaged."""
        path = dataset_path(prefix, ".json")
        if not path.exists():
            return None
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise DatasetError(
                f"{path}: not a dataset description ({error}). Run tools/preprocess_data.py again"
            ) from None


def dataset_path(prefix: str | Path, suffix: str) -> Path:
    """PREFIX.bin and the like; a dot in the last part of the prefix is no suffix."""
    return Path(f"{prefix}{suffix}")


class Header(NamedTuple):
    """The first bytes of an .idx file, checked."""

    dtype: np.dtype
    """Of the ids in the .bin file."""
    sequences: int
    boundaries: int
    """Document boundaries: one more than documents."""


def read_header(path: Path) -> Header:
    """The header of an .idx file. Raises DatasetError when it is none, or the file's size does not fit it."""
    size = path.stat().st_size
    if size < HEADER.size:
        raise DatasetError(f"{path}: {size} bytes, too short for an MMIDIDX header of {HEADER.size}. {REMAKE}")
    with path.open("rb") as file:
        magic, version, code, sequences, boundaries = HEADER.unpack(file.read(HEADER.size))
    if magic != MAGIC:
        raise DatasetError(f"{path}: starts with {magic!r}, not {MAGIC!r}: no MMIDIDX file. {REMAKE}")
    if version != VERSION:
        raise DatasetError(f"{path}: MMIDIDX version {version}; only version {VERSION} is known. {REMAKE}")
    if code not in DTYPES or np.dtype(DTYPES[code]).kind == "f":
        raise DatasetError(f"{path}: dtype code {code} is no integer type; token ids are codes 1 to 5 or 8. {REMAKE}")
    needed = HEADER.size + 12 * sequences + 8 * boundaries
    if size not in (needed, needed + sequences):
        raise DatasetError(
            f"{path}: {size} bytes, but {sequences} sequences and {boundaries} document boundaries take {needed} "
            f"({needed + sequences} with modes). The file is damaged or was cut short. {REMAKE}"
        )
    return Header(np.dtype(DTYPES[code]), sequences, boundaries)
