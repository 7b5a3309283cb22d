"""Indexed datasets: token sequences in PREFIX.bin, where they lie in PREFIX.idx (the MMIDIDX format, version 1).

The .bin file holds the token arrays one after another. The .idx file, little-endian, holds

    9 bytes      MMIDIDX and two zero bytes
    u64          version, 1
    u8           dtype code
    u64, u64     number of sequences n, number of document boundaries d + 1
    n int32      lengths in tokens
    n int64      byte offsets into .bin
    d + 1 int64  first sequence of each document, then n
    n int8       modes, optional and not read

PREFIX.json beside them tells what made the ids: see DatasetInfo.
"""

import hashlib
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar

import numpy as np

from megalite.data.streams import GatheredStream, TokenStream

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
"""Dtype code in the .idx file -> NumPy dtype of the .bin file."""
CHUNK = 1 << 20
"""Index entries looked at or copied at a time: memory stays small however many sequences there are."""
SAMPLED = 256
"""Places of the index that are looked at when a dataset is opened."""
FINGERPRINT = 2
"""Which way of making fingerprints this is."""
BLOCK, BLOCKS = 1 << 14, 64
"""Bytes in a block, and blocks of each file, that the fingerprint is made of."""
REMAKE = "Make it again with tools/preprocess_data.py"


class DatasetError(ValueError):
    """Data that cannot be used: names the file or split, the value found, and what to do."""


@dataclass(frozen=True)
class DatasetInfo:
    """What PREFIX.json says of an indexed dataset: what made it, and its size. Older files do not tell all: None."""

    TOKENIZER: ClassVar = ("tokenizer_type", "vocab_size", "eod", "tokenizer_sha256")
    """The fields that tell one tokenizer from another."""
    tokenizer_type: str
    vocab_size: int
    """Every id in the data is below this."""
    eod: int | None
    """Id of the end-of-document token; None when the tokenizer has none."""
    tokenizer_sha256: str
    """Digest of the tokenizer's model, to tell two tokenizers of one type apart."""
    documents: int
    tokens: int
    sentences: bool | None = None
    """Whether documents were split into sentences, each a sequence."""
    append_eod: bool | None = None
    """Whether every document ends with the end-of-document token."""
    inputs: str | None = None
    """Of a shard: a digest of names and sizes of all the inputs that it is a part of."""
    parse_special_tokens: bool = False
    """Whether the text of a special token became that token."""

    @classmethod
    def read(cls, prefix: str | Path) -> "DatasetInfo | None":
        """The description beside the dataset at `prefix`, None when there is none. Raises DatasetError if damaged."""
        path = dataset_path(prefix, ".json")
        if not path.exists():
            return None
        try:
            info = cls(**json.loads(path.read_text(encoding="utf-8")))
            for field in fields(info):
                if not isinstance(value := getattr(info, field.name), field.type):
                    raise ValueError(f"{field.name} is {value!r}")
            return info
        except (ValueError, TypeError) as error:
            raise DatasetError(
                f"{path}: not a dataset description ({error}). Run tools/preprocess_data.py again"
            ) from None


def dataset_path(prefix: str | Path, suffix: str) -> Path:
    """PREFIX.bin and the like; a dot in the last part of the prefix is no suffix."""
    return Path(f"{prefix}{suffix}")


class IndexedDataset:
    """An indexed dataset opened for reading through memory maps, in an instant whatever its size.

    Opening checks the header, the sizes of both files, the ends of the index, and SAMPLED places between them;
    megalite.preprocess.indexed_verify checks every entry. Raises DatasetError when a file is missing, is no MMIDIDX v1
    file, is cut short, or does not fit its partner.
    """

    def __init__(self, prefix: str | Path):
        self.prefix = str(prefix)
        self.index_path, self.bin_path = dataset_path(prefix, ".idx"), dataset_path(prefix, ".bin")
        for path in (self.index_path, self.bin_path):
            if not path.is_file():
                raise DatasetError(
                    f"{path}: no such file. A dataset is named by the prefix of its .bin and .idx files, without the "
                    "suffix; tools/preprocess_data.py makes them"
                )
        self._read_index()
        self.bin_size = self.bin_path.stat().st_size
        """Bytes of the .bin file."""
        self.contiguous = self._check()
        """Whether the sequences lie one after another in the .bin file, without gaps: as far as opening looks."""
        self.ids = _map(self.bin_path, self.dtype, 0, self.bin_size // self.dtype.itemsize)
        """All of the .bin file."""

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences; where these are not contiguous, the index is read to count them."""
        return len(self.ids) if self.contiguous else int(self.lengths.sum(dtype=np.int64))

    def _read_index(self) -> None:
        path, size = self.index_path, self.index_path.stat().st_size
        if size < HEADER.size:
            raise DatasetError(
                f"{path}: {size} bytes, too short for an MMIDIDX header of {HEADER.size}. {REMAKE}"
            )
        with path.open("rb") as file:
            magic, version, code, sequences, boundaries = HEADER.unpack(file.read(HEADER.size))
        if magic != MAGIC:
            raise DatasetError(
                f"{path}: starts with {magic!r}, not {MAGIC!r}: no MMIDIDX file. {REMAKE}"
            )
        if version != VERSION:
            raise DatasetError(
                f"{path}: MMIDIDX version {version}; only version {VERSION} is known. {REMAKE}"
            )
        if code not in DTYPES or np.dtype(DTYPES[code]).kind == "f":
            raise DatasetError(
                f"{path}: dtype code {code} is no integer type; token ids are codes 1 to 5 or 8. {REMAKE}"
            )
        needed = HEADER.size + 12 * sequences + 8 * boundaries
        if size not in (needed, needed + sequences):
            raise DatasetError(
                f"{path}: {size} bytes, but {sequences} sequences and {boundaries} document boundaries take {needed} "
                f"({needed + sequences} with modes). The file is damaged or was cut short. {REMAKE}"
            )
        self.dtype = np.dtype(DTYPES[code])
        self.lengths = _map(path, "<i4", HEADER.size, sequences)
        """int32 [sequences]: tokens in each sequence."""
        self.offsets = _map(path, "<i8", HEADER.size + 4 * sequences, sequences)
        """int64 [sequences]: byte of the .bin file at which each sequence starts."""
        self.document_indices = _map(path, "<i8", HEADER.size + 12 * sequences, boundaries)
        """int64 [documents + 1]: first sequence of each document, then the number of sequences."""

    def _check(self) -> bool:
        """Check evenly spaced entries and their neighbours, and the ends. Whether all of these are contiguous: a file
        with gaps or shared sequences has them all over, not in one place."""
        count, bounds = len(self.lengths), self.document_indices
        if len(bounds) == 0 or bounds[0] != 0 or bounds[-1] != count:
            found = f"{bounds[0]} to {bounds[-1]}" if len(bounds) else "nothing"
            raise DatasetError(
                f"{self.index_path}: document boundaries run from {found}, not from 0 to {count}, the number of "
                f"sequences. {REMAKE}"
            )
        places = spread(count)
        for problem in (
            *self.boundary_problems(spread(len(bounds))),
            *self.sequence_problems(places),
        ):
            raise DatasetError(problem)
        if count and (self.offsets[0] != 0 or len(self.breaks(places))):
            return False
        last = int(self.offsets[-1]) + int(self.lengths[-1]) * self.dtype.itemsize if count else 0
        if last != self.bin_size:
            raise DatasetError(
                f"{self.bin_path}: {self.bin_size} bytes, but {self.index_path} tells of {last}. "
                f"The two files do not belong together. {REMAKE}"
            )
        return True

    def sequence_problems(self, places: np.ndarray) -> Iterator[str]:
        """Which of these sequences do not lie in the .bin file."""
        itemsize, size = self.dtype.itemsize, self.bin_size
        lengths, offsets = self.lengths[places].astype(np.int64), self.offsets[places]
        ends = (
            offsets + lengths * itemsize
        )  # beyond 2^63 they wrap, so offsets are compared with the size too
        bad = (
            (lengths < 0)
            | (offsets < 0)
            | (offsets > size)
            | (offsets % itemsize != 0)
            | (ends > size)
        )
        for i in np.flatnonzero(bad):
            yield (
                f"{self.bin_path}: sequence {places[i]} of {lengths[i]} tokens should lie at bytes {offsets[i]} to "
                f"{ends[i]}, but the file has {size}. It is damaged, cut short or belongs to another .idx. {REMAKE}"
            )

    def boundary_problems(self, places: np.ndarray) -> Iterator[str]:
        """Which of these document boundaries are followed by a smaller one, or lie outside the sequences."""
        bounds = self.document_indices
        here, after = bounds[places], bounds[np.minimum(places + 1, len(bounds) - 1)]
        for i in np.flatnonzero((here < 0) | (here > after) | (after > len(self))):
            yield (
                f"{self.index_path}: document boundaries go backwards or beyond the {len(self)} sequences: {here[i]}, "
                f"then {after[i]} for document {places[i]}. {REMAKE}"
            )

    def breaks(self, places: np.ndarray) -> np.ndarray:
        """Those of these sequences after which the next one does not start where they end."""
        places = places[places < len(self) - 1]
        ends = self.offsets[places] + self.lengths[places].astype(np.int64) * self.dtype.itemsize
        return places[ends != self.offsets[places + 1]]

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.lengths)

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return len(self.document_indices) - 1

    def sequence(self, i: int) -> np.ndarray:
        """The token ids of sequence i, 0 <= i < len(self): a view of the file, in its dtype."""
        start = int(self.offsets[i]) // self.dtype.itemsize
        return self.ids[start : start + int(self.lengths[i])]

    def tokens(
        self, first_document: int = 0, last_document: int | None = None
    ) -> "TokenStream | GatheredStream":
        """The tokens of documents [first_document, last_document) as one stream.

        Two look-ups where the sequences are contiguous; otherwise a GatheredStream, which reads that part of the index.
        """
        last_document = self.num_documents if last_document is None else last_document
        if not 0 <= first_document <= last_document <= self.num_documents:
            raise DatasetError(
                f"{self.prefix}: documents {first_document} to {last_document} asked for, it has {self.num_documents}"
            )
        documents = f"{first_document}:{last_document}"
        first, last = (int(self.document_indices[i]) for i in (first_document, last_document))
        if not self.contiguous:
            return GatheredStream(self, np.arange(first, last), documents)
        ends = (
            int(self.offsets[i]) // self.dtype.itemsize if i < len(self) else len(self.ids)
            for i in (first, last)
        )
        return TokenStream(self, *ends, documents)

    def fingerprint(self) -> str:
        """A digest of both files' sizes and of evenly spaced blocks of them: cheap at any size.

        Small files are read whole. In large ones, a change that leaves the sizes and all of these blocks as they were
        is not seen. The number before the colon changes with the way it is made.
        """
        digest = hashlib.sha256()
        for path in (self.index_path, self.bin_path):
            size = path.stat().st_size
            digest.update(str(size).encode())
            with path.open("rb") as file:
                for place in spread(-(-size // BLOCK), BLOCKS):
                    file.seek(int(place) * BLOCK)
                    digest.update(file.read(BLOCK))
        return f"{FINGERPRINT}:{digest.hexdigest()}"


def spread(count: int, places: int = SAMPLED) -> np.ndarray:
    """At most `places` evenly spaced numbers of 0 .. count - 1, the first and the last among them."""
    if count <= places:
        return np.arange(count)
    return np.arange(places) * (count - 1) // (places - 1)


def _map(path: Path, dtype, offset: int, count: int) -> np.ndarray:
    """A read-only view of `count` values of a file at a byte offset. Empty files cannot be mapped."""
    if count == 0:
        return np.empty(0, dtype)
    return np.asarray(np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(count,)))
