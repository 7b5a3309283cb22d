"""Checks of the index of a dataset: of a few places when it is opened, of all of it by `find_problems`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from megalite.data.indexed.format import CHUNK, REMAKE, DatasetError, DatasetInfo

if TYPE_CHECKING:
    from megalite.data.indexed.reader import IndexedDataset

SAMPLED = 1000
"""Places of each array that opening a dataset looks at."""
MOST = 20
"""Problems told before a full check gives up."""


def spread(n: int, most: int) -> np.ndarray:
    """At most `most` of the numbers 0 .. n - 1, evenly spaced, both ends among them; all when there are no more."""
    return np.arange(n) if n <= most else np.arange(most) * (n - 1) // (most - 1)


def sequence_problems(data: IndexedDataset, where: np.ndarray) -> Iterator[str]:
    """Which of these sequences do not lie in the .bin file."""
    itemsize, size = data.dtype.itemsize, data.bin_size
    lengths, offsets = data.lengths[where].astype(np.int64), data.offsets[where]
    ends = offsets + lengths * itemsize
    bad = (lengths < 0) | (offsets < 0) | (offsets > size) | (offsets % itemsize != 0) | (ends > size)
    for i in np.flatnonzero(bad):
        yield (
            f"{data.bin_path}: sequence {where[i]} of {lengths[i]} tokens should lie at bytes {offsets[i]} to "
            f"{ends[i]}, but the file has {size}. It is damaged, cut short or belongs to another .idx. {REMAKE}"
        )


def boundary_problems(data: IndexedDataset, where: np.ndarray) -> Iterator[str]:
    """Which of these document boundaries are followed by a smaller one, or lie outside the sequences."""
    bounds = data.document_indices
    here, after = bounds[where], bounds[np.minimum(where + 1, len(bounds) - 1)]
    for i in np.flatnonzero((here < 0) | (here > after) | (after > len(data))):
        yield (
            f"{data.index_path}: document boundaries go backwards or beyond the {len(data)} sequences: {here[i]}, then "
            f"{after[i]} for document {where[i]}. {REMAKE}"
        )


def breaks(data: IndexedDataset, where: np.ndarray) -> np.ndarray:
    """Those of these sequences after which the next does not start where they end."""
    where = where[where < len(data) - 1]
    ends = data.offsets[where] + data.lengths[where].astype(np.int64) * data.dtype.itemsize
    return where[ends != data.offsets[where + 1]]


def find_problems(data: IndexedDataset, progress: Callable[[float], None] | None = None) -> list[str]:
    """Everything that is wrong with an opened dataset, at most MOST problems, in bounded memory.

    Every length, offset and document boundary is checked; where opening found the sequences contiguous, that each
    starts where the one before ends; and with a PREFIX.json, its counts and that every id is below its vocabulary.
    """
    return list(islice(_problems(data, progress or (lambda share: None)), MOST))


def _problems(data: IndexedDataset, progress: Callable[[float], None]) -> Iterator[str]:
    try:
        info = DatasetInfo.read(data.prefix)
    except DatasetError as error:
        info = None
        yield str(error)
    if info is not None and (info.documents, info.tokens) != (data.num_documents, data.num_tokens):
        yield (
            f"{data.prefix}.json tells of {info.documents} documents and {info.tokens} tokens, the files hold "
            f"{data.num_documents} and {data.num_tokens}. {REMAKE}"
        )
    parts = [(_index_problems, len(data)), (boundary_problems, len(data.document_indices))]
    if info is not None:
        parts.append((partial(_id_problems, vocab_size=info.vocab_size), len(data.ids)))
    total, done = sum(count for _, count in parts), 0
    for check, count in parts:
        for start in range(0, count, CHUNK):
            stop = min(start + CHUNK, count)
            yield from check(data, np.arange(start, stop))
            progress((done + stop) / total)
        done += count


def _index_problems(data: IndexedDataset, where: np.ndarray) -> Iterator[str]:
    yield from sequence_problems(data, where)
    for i in breaks(data, where) if data.contiguous else ():
        yield (
            f"{data.index_path}: sequence {i + 1} starts at byte {data.offsets[i + 1]}, not where the one before ends. "
            f"It is read as if it did, since in the places looked at when opening all do. {REMAKE}"
        )


def _id_problems(data: IndexedDataset, where: np.ndarray, vocab_size: int) -> Iterator[str]:
    ids = data.ids[where[0] : where[-1] + 1]
    bad = np.flatnonzero((ids < 0) | (ids >= vocab_size))
    if len(bad):
        first = where[0] + bad[0]
        yield (
            f"{data.bin_path}: id {data.ids[first]} at token {first}, but {data.prefix}.json tells of a vocabulary of "
            f"{vocab_size} entries ({len(bad)} such ids in tokens {where[0]} to {where[-1]}). {REMAKE}"
        )
