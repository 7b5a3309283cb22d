"""Indexed datasets: token sequences in PREFIX.bin, described by PREFIX.idx (MMIDIDX version 1).

The .bin file holds the token arrays one after another. The .idx file, little-endian, holds

    9 bytes      MMIDIDX and two zero bytes
    u64          version, 1
    u8           dtype code
    u64, u64     number of sequences n, number of document boundaries d + 1
    n int32      lengths in tokens
    n int64      byte offsets into .bin
    d + 1 int64  first sequence of each document, then n
    n int8       modes, optional and not read

PREFIX.json beside them describes how the dataset was made: see DatasetInfo.
"""

import hashlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import ClassVar

import msgspec
import numpy as np

from megalite.data.mapping import map_file
from megalite.data.streams import GatheredStream, TokenStream
from megalite.system.errors import ReportedError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
"""Dtype code in the .idx file -> NumPy dtype of the .bin file."""
CHUNK = 1 << 20
"""Index entries read or copied at a time, so that memory does not grow with the dataset."""
SAMPLED = 256
"""Index entries that are checked when a dataset is opened."""
FINGERPRINT = 2
"""Version of the algorithm of fingerprints."""
BLOCK = 1 << 14
"""Bytes of a block that the fingerprint reads."""
BLOCKS = 64
"""Blocks of each file that the fingerprint reads."""
REMAKE = "Make the dataset again with tools/preprocess_data.py"


class DatasetError(ReportedError, ValueError):
    """Data that cannot be used: names the file or split, the value found, and what to do."""


@dataclass(frozen=True)
class DatasetInfo:
    """What PREFIX.json says about a dataset. Fields that older files do not have are None."""

    TOKENIZER: ClassVar = ("tokenizer_type", "vocab_size", "eod", "tokenizer_sha256")
    """The fields that distinguish one tokenizer from another."""
    tokenizer_type: str
    vocab_size: int
    """Every id in the data is below this."""
    eod: int | None
    """Id of the end-of-document token; None when the tokenizer has none."""
    tokenizer_sha256: str
    """Digest of the tokenizer's model, which distinguishes two tokenizers of one type."""
    documents: int
    tokens: int
    sentences: bool | None = None
    """Whether documents were split into sentences, each a sequence."""
    append_eod: bool | None = None
    """Whether every document ends with the end-of-document token."""
    inputs: str | None = None
    """For a shard: a digest of the names and sizes of all input files of the whole dataset."""
    parse_special_tokens: bool = False
    """Whether the text of a special token became that token."""

    @classmethod
    def read(cls, prefix: str | Path) -> "DatasetInfo | None":
        """The description of the dataset at `prefix`, or None when there is no PREFIX.json.

        Raises DatasetError when the file is damaged.
        """
        path = dataset_path(prefix, ".json")
        if not path.exists():
            return None
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except msgspec.MsgspecError as error:
            raise DatasetError(f"{path}: not a dataset description ({error}). {REMAKE}") from None


def dataset_path(prefix: str | Path, suffix: str) -> Path:
    """PREFIX.bin and the like; a dot in the last component of the prefix is not a suffix."""
    return Path(f"{prefix}{suffix}")


class IndexedDataset:
    """An indexed dataset, read through memory maps that hold no file descriptors.

    Opening takes the same time at any size: it checks the header, the sizes of both files, the ends
    of the index, and SAMPLED entries between them. megalite.preprocess.indexed_verify checks all.

    Raises DatasetError when a file is missing, is no MMIDIDX version 1 file, is cut short, or does
    not match its partner, and OSError when it cannot be read.
    """

    dtype: np.dtype
    """Of the token ids."""
    lengths: np.ndarray
    """int32 [sequences]: tokens in each sequence."""
    offsets: np.ndarray
    """int64 [sequences]: byte of the .bin file at which each sequence starts."""
    document_indices: np.ndarray
    """int64 [documents + 1]: first sequence of each document, then the number of sequences."""

    def __init__(self, prefix: str | Path):
        self.prefix = str(prefix)
        self.index_path = dataset_path(prefix, ".idx")
        self.bin_path = dataset_path(prefix, ".bin")
        for path in (self.index_path, self.bin_path):
            if not path.is_file():
                raise DatasetError(
                    f"{path}: no such file. Give the common prefix of the .bin and .idx files, "
                    "without the suffix; tools/preprocess_data.py makes both"
                )
        self._index = map_file(self.index_path)
        self._bin = map_file(self.bin_path)
        self._read_index()
        self.contiguous = self._check()
        """Whether the sequences follow one another in the .bin file without gaps, as far as the
        entries that are checked when opening show."""
        whole = self.bin_size - self.bin_size % self.dtype.itemsize
        self.ids = self._bin[:whole].view(self.dtype)
        """All token ids of the .bin file."""

    @property
    def bin_size(self) -> int:
        """Bytes of the .bin file."""
        return len(self._bin)

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences. Reads the whole index when the sequences are not contiguous."""
        if self.contiguous:
            return len(self.ids)
        return int(self.lengths.sum(dtype=np.int64))

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return len(self.document_indices) - 1

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.lengths)

    def _read_index(self) -> None:
        """Read the header of the .idx file, and map its arrays."""
        size = len(self._index)
        if size < HEADER.size:
            raise self._error(f"{size} bytes, too short for an MMIDIDX header of {HEADER.size}")
        magic, version, code, sequences, boundaries = HEADER.unpack_from(self._index)
        if magic != MAGIC:
            raise self._error(f"not an MMIDIDX file: starts with {magic!r}, not {MAGIC!r}")
        if version != VERSION:
            raise self._error(f"MMIDIDX version {version}; only version {VERSION} is supported")
        if np.dtype(DTYPES.get(code, "f4")).kind == "f":
            raise self._error(
                f"dtype code {code} is not an integer type; token ids have codes 1 to 5 or 8"
            )
        needed = HEADER.size + 12 * sequences + 8 * boundaries
        if size not in (needed, needed + sequences):
            raise self._error(
                f"{size} bytes, but {sequences} sequences and {boundaries} document boundaries "
                f"take {needed} ({needed + sequences} with modes). The file is damaged or was cut "
                "short"
            )
        offsets = HEADER.size + 4 * sequences
        documents = HEADER.size + 12 * sequences
        self.dtype = np.dtype(DTYPES[code])
        self.lengths = self._index[HEADER.size : offsets].view("<i4")
        self.offsets = self._index[offsets:documents].view("<i8")
        self.document_indices = self._index[documents : documents + 8 * boundaries].view("<i8")

    def _error(self, problem: str) -> DatasetError:
        return DatasetError(f"{self.index_path}: {problem}. {REMAKE}")

    def _check(self) -> bool:
        """Check the ends of the index and evenly spaced entries. Returns `contiguous`.

        Looking at some entries is enough for that: a file with gaps or shared sequences has them
        everywhere, not in one place.
        """
        count = len(self)
        bounds = self.document_indices
        if len(bounds) == 0 or bounds[0] != 0 or bounds[-1] != count:
            found = f"from {bounds[0]} to {bounds[-1]}" if len(bounds) else "empty"
            raise self._error(
                f"document boundaries are {found}; they must run from 0 to {count}, the number of "
                "sequences"
            )
        sampled = spread(count)
        boundaries = self.boundary_problems(spread(len(bounds)))
        for problem in chain(boundaries, self.sequence_problems(sampled)):
            raise DatasetError(problem)
        if count and (self.offsets[0] != 0 or len(self.gaps(sampled))):
            return False
        # Contiguous sequences fill the .bin file.
        end = int(self.offsets[-1:].sum() + self.lengths[-1:].sum() * self.dtype.itemsize)
        if end != self.bin_size:
            raise DatasetError(
                f"{self.bin_path}: {self.bin_size} bytes, but {self.index_path} describes {end}. "
                f"The two files do not belong together. {REMAKE}"
            )
        return True

    def sequence_problems(self, sequences: np.ndarray) -> Iterator[str]:
        """A message for each of these sequences (indices [n]) that lies outside the .bin file."""
        itemsize = self.dtype.itemsize
        size = self.bin_size
        lengths = self.lengths[sequences].astype(np.int64)
        offsets = self.offsets[sequences]
        # An end beyond 2^63 wraps around, so offsets are compared with the size as well.
        ends = offsets + lengths * itemsize
        outside = (lengths < 0) | (offsets < 0) | (offsets > size) | (ends > size)
        for i in np.flatnonzero(outside | (offsets % itemsize != 0)):
            yield (
                f"{self.bin_path}: sequence {sequences[i]} of {lengths[i]} tokens should lie at "
                f"bytes {offsets[i]} to {ends[i]}, but the file has {size}. It is damaged, cut "
                f"short or belongs to another .idx. {REMAKE}"
            )

    def boundary_problems(self, documents: np.ndarray) -> Iterator[str]:
        """A message for each of these document boundaries (indices [n]) that is wrong: it is larger
        than the next one, or outside the sequences."""
        bounds = self.document_indices
        here = bounds[documents]
        after = bounds[np.minimum(documents + 1, len(bounds) - 1)]
        for i in np.flatnonzero((here < 0) | (here > after) | (after > len(self))):
            yield (
                f"{self.index_path}: document boundaries go backwards or beyond the {len(self)} "
                f"sequences: {here[i]}, then {after[i]} for document {documents[i]}. {REMAKE}"
            )

    def gaps(self, sequences: np.ndarray) -> np.ndarray:
        """Those of these sequences (indices [n]) that do not end where the next one starts."""
        sequences = sequences[sequences < len(self) - 1]
        sizes = self.lengths[sequences].astype(np.int64) * self.dtype.itemsize
        return sequences[self.offsets[sequences] + sizes != self.offsets[sequences + 1]]

    def sequence(self, i: int) -> np.ndarray:
        """The token ids of sequence i, 0 <= i < len(self): a view of the file, in its dtype."""
        start = int(self.offsets[i]) // self.dtype.itemsize
        return self.ids[start : start + int(self.lengths[i])]

    def tokens(self, first_document: int = 0, last_document: int | None = None) -> TokenStream:
        """The tokens of documents [first_document, last_document) as one stream.

        Takes two look-ups when the sequences are contiguous. Otherwise the result is a
        GatheredStream, which reads these documents' share of the index.

        Raises DatasetError for documents that the dataset does not have.
        """
        if last_document is None:
            last_document = self.num_documents
        if not 0 <= first_document <= last_document <= self.num_documents:
            raise DatasetError(
                f"{self.prefix}: documents {first_document} to {last_document} requested, "
                f"but it has {self.num_documents}"
            )
        name = f"{first_document}:{last_document}"
        first, last = self.document_indices[[first_document, last_document]].tolist()
        if not self.contiguous:
            return GatheredStream(self, np.arange(first, last), name)
        return TokenStream(self, self._position(first), self._position(last), name)

    def _position(self, sequence: int) -> int:
        """Position in `ids` of a sequence's first token, or the end for sequence len(self)."""
        if sequence == len(self):
            return len(self.ids)
        return int(self.offsets[sequence]) // self.dtype.itemsize

    def fingerprint(self) -> str:
        """A digest of the sizes of both files and of evenly spaced blocks of their contents.

        Small files are read whole. In large ones, a change that leaves the sizes and these blocks
        as they were is not noticed. The number before the colon is FINGERPRINT.
        """
        digest = hashlib.sha256()
        for content in (self._index, self._bin):
            digest.update(str(len(content)).encode())
            for block in spread(-(-len(content) // BLOCK), BLOCKS):
                digest.update(content[block * BLOCK : (block + 1) * BLOCK])
        return f"{FINGERPRINT}:{digest.hexdigest()}"


def spread(count: int, limit: int = SAMPLED) -> np.ndarray:
    """At most `limit` evenly spaced numbers from 0 to count - 1, both ends included."""
    if count <= limit:
        return np.arange(count)
    return np.arange(limit) * (count - 1) // (limit - 1)


def check_ids(ids: np.ndarray, vocab_size: int, location: str) -> None:
    """Raise DatasetError when an id of ids [n], n >= 1, is negative or not below `vocab_size`.

    location: where the ids come from; begins the message.
    """
    # Read as unsigned numbers, negative ids are the largest: one maximum finds both kinds.
    unsigned = ids.view(f"u{ids.dtype.itemsize}")
    if unsigned.max() < min(vocab_size, np.iinfo(ids.dtype).max + 1):
        return
    worst = ids.min() if ids.min() < 0 else ids.max()
    raise DatasetError(
        f"{location}: id {worst}, but the vocabulary has {vocab_size} entries. The data was made "
        "with another tokenizer, or --vocab-size is too small"
    )
