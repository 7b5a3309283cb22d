"""Reading indexed datasets through memory maps. Opening looks at a fixed number of places, however large the files."""

import hashlib
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np

from megalite.data.indexed.check import SAMPLED, boundary_problems, breaks, find_problems, sequence_problems, spread
from megalite.data.indexed.format import CHUNK, HEADER, REMAKE, DatasetError, dataset_path, read_header

FINGERPRINT = "2:"
"""Begins every fingerprint; another number when the way they are made changes."""
DIGEST_BLOCKS, DIGEST_BLOCK = 64, 4096
"""How many blocks of each file the fingerprint reads, and their bytes."""


class IndexedDataset:
    """An indexed dataset opened for reading through memory maps.

    Opening checks the header, the sizes of both files, the first and last boundary, the end of the last sequence, and
    about SAMPLED evenly spaced sequences and document boundaries with their neighbours: nothing that grows with the
    data. Files of fewer sequences are checked in full. `verify` checks everything.

    Raises DatasetError when a file is missing, is no MMIDIDX v1 file, is cut short, or does not fit its partner.
    """

    def __init__(self, prefix: str | Path):
        self.prefix = str(prefix)
        self.index_path, self.bin_path = dataset_path(prefix, ".idx"), dataset_path(prefix, ".bin")
        for path in (self.index_path, self.bin_path):
            if not path.is_file():
                raise DatasetError(
                    f"{path}: no such file. --data-path takes the prefix of a .bin and .idx pair made by "
                    "tools/preprocess_data.py, without the suffix"
                )
        self.dtype, sequences, boundaries = read_header(self.index_path)
        self.lengths = _map(self.index_path, "<i4", HEADER.size, sequences)
        """int32 [sequences]: tokens in each sequence."""
        self.offsets = _map(self.index_path, "<i8", HEADER.size + 4 * sequences, sequences)
        """int64 [sequences]: byte of the .bin file at which each sequence starts."""
        self.document_indices = _map(self.index_path, "<i8", HEADER.size + 12 * sequences, boundaries)
        """int64 [documents + 1]: first sequence of each document, then the number of sequences."""
        self.bin_size = self.bin_path.stat().st_size
        """Bytes of the .bin file."""
        self.ids = _map(self.bin_path, self.dtype, 0, self.bin_size // self.dtype.itemsize)
        """All of the .bin file."""
        self.contiguous = self._check()
        """Whether the sequences lie one after another in the .bin file, without gaps: as far as opening looks."""

    def _check(self) -> bool:
        """Whether the sequences are contiguous. Raises DatasetError for the first problem in the places looked at."""
        sequences, bounds = len(self.lengths), self.document_indices
        if len(bounds) == 0 or bounds[0] != 0 or bounds[-1] != sequences:
            found = f"{bounds[0]} to {bounds[-1]}" if len(bounds) else "nothing"
            raise DatasetError(
                f"{self.index_path}: document boundaries run from {found}, not from 0 to {sequences}, "
                f"the number of sequences. {REMAKE}"
            )
        places = spread(sequences, SAMPLED)
        for problem in (*boundary_problems(self, spread(len(bounds), SAMPLED)), *sequence_problems(self, places)):
            raise DatasetError(problem)
        if sequences and (self.offsets[0] != 0 or len(breaks(self, places))):
            return False
        end = int(self.offsets[-1]) + int(self.lengths[-1]) * self.dtype.itemsize if sequences else 0
        if end != self.bin_size:
            raise DatasetError(
                f"{self.bin_path}: {self.bin_size} bytes, but {self.index_path} tells of {end}. "
                f"The two files do not belong together. {REMAKE}"
            )
        return True

    def verify(self, progress: Callable[[float], None] | None = None) -> list[str]:
        """Check every length, offset and boundary, and every id against PREFIX.json; see check.find_problems.

        Args:
            progress: called with the share that is done, 0 to 1.

        Returns the problems found, at most check.MOST. Reads both files from end to end, in bounded memory.
        """
        return find_problems(self, progress)

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.lengths)

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return len(self.document_indices) - 1

    @cached_property
    def num_tokens(self) -> int:
        """Tokens in all sequences. Reads the lengths where the sequences are not contiguous."""
        if self.contiguous:
            return len(self.ids)
        return sum(int(self.lengths[i : i + CHUNK].sum(dtype=np.int64)) for i in range(0, len(self), CHUNK))

    def sequence(self, i: int) -> np.ndarray:
        """The token ids of sequence i, 0 <= i < len(self): a view of the file, in its dtype."""
        start = int(self.offsets[i]) // self.dtype.itemsize
        return self.ids[start : start + int(self.lengths[i])]

    def tokens(self, first_document: int = 0, last_document: int | None = None) -> "TokenStream | GatheredStream":
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
        ends = (int(self.offsets[i]) // self.dtype.itemsize if i < len(self) else len(self.ids) for i in (first, last))
        return TokenStream(self, *ends, documents)

    def fingerprint(self) -> str:
        """Tells this data from other data, at the same small cost for any size: FINGERPRINT and a SHA-256.

        It covers the sizes of both files, the header, and 64 evenly spaced blocks of 4 KiB of each file, or all of
        a file that is no larger than these. Two datasets of equal sizes that differ only between the blocks are not
        told apart.
        """
        return self._digest

    @cached_property
    def _digest(self) -> str:
        digest = hashlib.sha256()
        for path in (self.index_path, self.bin_path):
            size = path.stat().st_size
            digest.update(size.to_bytes(8, "little"))
            with path.open("rb") as file:
                if size <= DIGEST_BLOCKS * DIGEST_BLOCK:
                    digest.update(file.read())
                    continue
                for block in range(DIGEST_BLOCKS):
                    file.seek(block * (size - DIGEST_BLOCK) // (DIGEST_BLOCKS - 1))
                    digest.update(file.read(DIGEST_BLOCK))
        return FINGERPRINT + digest.hexdigest()


class TokenStream:
    """A stretch of the .bin file as one flat sequence of tokens. `len()` is its number of tokens.

    Args:
        dataset: a contiguous one.
        start, stop: tokens [start, stop) of the file.
        name: the part of the dataset that this is, for the fingerprint.
    """

    def __init__(self, dataset: IndexedDataset, start: int, stop: int, name: str):
        self.dtype = dataset.dtype
        self._dataset, self._ids, self._name = dataset, dataset.ids[start:stop], name

    def __len__(self) -> int:
        return len(self._ids)

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Token ids [start, stop), 0 <= start <= stop <= len, in the dtype of the file: a view of it."""
        return self._ids[start:stop]

    def fingerprint(self) -> str:
        """Tells this stream from others: the dataset's fingerprint and the part taken from it."""
        return f"{self._dataset.fingerprint()}[{self._name}]"


class GatheredStream:
    """Sequences of a dataset in any order as one flat sequence of tokens. `len()` is its number of tokens.

    Holds, beside the order, 8 bytes for each sequence: where it starts in the stream.

    Args:
        dataset: contiguous or not.
        order: numbers of sequences, integers [n]; any order, repeated or not.
        name: what these are, for the fingerprint.
    """

    def __init__(self, dataset: IndexedDataset, order: np.ndarray, name: str):
        self.dtype = dataset.dtype
        self._dataset, self._order, self._name = dataset, order, name
        self._starts = np.zeros(len(order) + 1, np.int64)
        np.cumsum(dataset.lengths[order], out=self._starts[1:])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Token ids [start, stop), 0 <= start <= stop <= len, in the file's dtype; a view of it within a sequence."""
        stop = len(self) if stop is None else stop
        first = int(self._starts.searchsorted(start, side="right")) - 1
        last = int(self._starts.searchsorted(stop, side="left"))
        starts = self._starts[first : last + 1]
        # In the file, token t of the stream lies at t + shift, with one shift for each sequence.
        shifts = self._dataset.offsets[self._order[first:last]] // self.dtype.itemsize - starts[:-1]
        if last - first == 1:
            return self._dataset.ids[start + shifts[0] : stop + shifts[0]]
        edges = starts.clip(start, stop)
        return self._dataset.ids[np.repeat(shifts, edges[1:] - edges[:-1]) + np.arange(start, stop)]

    def fingerprint(self) -> str:
        """Tells this stream from others: the dataset's fingerprint and the part taken from it."""
        return f"{self._dataset.fingerprint()}[{self._name}]"


def _map(path: Path, dtype, offset: int, count: int) -> np.ndarray:
    """A read-only view of `count` values of a file at a byte offset. Empty files cannot be mapped."""
    if count == 0:
        return np.empty(0, dtype)
    return np.asarray(np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(count,)))
