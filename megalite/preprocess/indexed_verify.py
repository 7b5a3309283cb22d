"""The full check of an indexed dataset: every entry of the index, and every token id."""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np

from megalite.data.indexed import CHUNK, REMAKE, DatasetError, DatasetInfo, IndexedDataset

MAX_PROBLEMS = 20
"""The check stops after this many."""


class Verification(NamedTuple):
    """What the full check found."""

    problems: list[str]
    """At most MAX_PROBLEMS messages; empty when the dataset is sound."""
    largest_id: int | None
    """Of the ids that were read, which are all of them when there is no problem. None: no ids."""


def verify(
    data: IndexedDataset, progress: Callable[[float], None] = lambda share: None
) -> Verification:
    """Check an opened dataset, in memory that does not grow with its size.

    Checks every length, offset and document boundary; that every id is at least 0; that sequences
    are contiguous throughout when the entries that were checked on opening are; and, when there is
    a PREFIX.json, its counts and that every id is below its vocabulary size.

    Args:
        data: the dataset.
        progress: called with the share of the work that is done, up to 1.
    """
    ids = _IdCheck(data)
    problems = list(islice(_problems(data, ids, progress), MAX_PROBLEMS))
    return Verification(problems, ids.largest)


def _problems(
    data: IndexedDataset, ids: "_IdCheck", progress: Callable[[float], None]
) -> Iterator[str]:
    # Compare with the description.
    info = None
    try:
        info = DatasetInfo.read(data.prefix)
    except DatasetError as error:
        yield str(error)
    if info is not None:
        ids.vocab_size = info.vocab_size
        if (info.documents, info.tokens) != (data.num_documents, data.num_tokens):
            yield (
                f"{data.prefix}.json describes {info.documents:,} documents and {info.tokens:,} "
                f"tokens, but the files hold {data.num_documents:,} and {data.num_tokens:,}. They "
                f"do not belong together, or are damaged. {REMAKE}"
            )
    # Run each check over all entries that it applies to, in chunks.
    checks = [
        (data.sequence_problems, len(data)),
        (data.boundary_problems, len(data.document_indices)),
        (ids.problems, len(data.ids)),
    ]
    if data.contiguous:
        checks.insert(2, (lambda sequences: _gaps(data, sequences), len(data)))
    total = sum(count for _, count in checks)
    done = 0
    for check, count in checks:
        for start in range(0, count, CHUNK):
            stop = min(start + CHUNK, count)
            yield from check(np.arange(start, stop))
            progress((done + stop) / total)
        done += count


def _gaps(data: IndexedDataset, sequences: np.ndarray) -> Iterator[str]:
    for i in data.gaps(sequences):
        yield (
            f"{data.index_path}: sequence {i + 1} starts at byte {data.offsets[i + 1]}, not where "
            "the one before ends. Training would read it as if it did, since the entries that are "
            f"checked on opening are contiguous. {REMAKE}"
        )


class _IdCheck:
    """Checks the ids of a dataset, and keeps the largest one that it has read."""

    def __init__(self, data: IndexedDataset):
        self._data = data
        self.vocab_size: int | None = None
        """Every id must be below this. None: any id of at least 0 is sound."""
        self.largest: int | None = None

    def problems(self, positions: np.ndarray) -> Iterator[str]:
        """At most one message for the ids at these consecutive positions."""
        first = int(positions[0])
        last = int(positions[-1])
        ids = self._data.ids[first : last + 1]
        largest = int(ids.max())
        if self.largest is None or largest > self.largest:
            self.largest = largest
        bad = ids < 0
        allowed = "ids are at least 0"
        if self.vocab_size is not None:
            bad |= ids >= self.vocab_size
            allowed = (
                f"{self._data.prefix}.json describes a vocabulary of {self.vocab_size} entries"
            )
        bad = np.flatnonzero(bad)
        if len(bad):
            yield (
                f"{self._data.bin_path}: id {ids[bad[0]]} at token {first + bad[0]}, but {allowed} "
                f"({len(bad)} such ids in tokens {first} to {last}). {REMAKE}"
            )
