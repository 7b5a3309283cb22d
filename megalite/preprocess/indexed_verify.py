"""The full check of an indexed dataset: every entry of the index, and every id against PREFIX.json."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice

import numpy as np

from megalite.data.indexed import CHUNK, REMAKE, DatasetError, DatasetInfo, IndexedDataset

MOST = 20
"""Problems told before the check gives up."""


def verify(
    data: IndexedDataset, progress: Callable[[float], None] = lambda share: None
) -> list[str]:
    """Everything that is wrong with an opened dataset, at most MOST problems, in bounded memory.

    Every length, offset and document boundary is checked; where opening, which looks at a sample, found the sequences
    contiguous, that each starts where the one before ends; and with a PREFIX.json, its counts and that every id is
    below its vocabulary.

    Args:
        data: the dataset.
        progress: called with the share that is done, up to 1.
    """
    return list(islice(_problems(data, progress), MOST))


def _problems(data: IndexedDataset, progress: Callable[[float], None]) -> Iterator[str]:
    try:
        info = DatasetInfo.read(data.prefix)
    except DatasetError as error:
        info = None
        yield str(error)
    if info is not None and (info.documents, info.tokens) != (data.num_documents, data.num_tokens):
        yield (
            f"{data.prefix}.json tells of {info.documents:,} documents and {info.tokens:,} tokens, the files hold "
            f"{data.num_documents:,} and {data.num_tokens:,}: they do not belong together, or are damaged. {REMAKE}"
        )
    parts = [
        (data.sequence_problems, len(data)),
        (data.boundary_problems, len(data.document_indices)),
    ]
    if data.contiguous:
        parts.append((partial(_breaks, data), len(data)))
    if info is not None:
        parts.append((partial(_foreign_ids, data, info.vocab_size), len(data.ids)))
    total, done = sum(count for _, count in parts), 0
    for check, count in parts:
        for start in range(0, count, CHUNK):
            stop = min(start + CHUNK, count)
            yield from check(np.arange(start, stop))
            progress((done + stop) / total)
        done += count


def _breaks(data: IndexedDataset, places: np.ndarray) -> Iterator[str]:
    for i in data.breaks(places):
        yield (
            f"{data.index_path}: sequence {i + 1} starts at byte {data.offsets[i + 1]}, not where the one before ends. "
            f"It is read as if it did, since in the places looked at when opening all do. {REMAKE}"
        )


def _foreign_ids(data: IndexedDataset, vocab_size: int, places: np.ndarray) -> Iterator[str]:
    first, last = int(places[0]), int(places[-1])
    ids = data.ids[first : last + 1]
    bad = np.flatnonzero((ids < 0) | (ids >= vocab_size))
    if len(bad):
        yield (
            f"{data.bin_path}: id {ids[bad[0]]} at token {first + bad[0]}, but {data.prefix}.json tells of a "
            f"vocabulary of {vocab_size} entries ({len(bad)} such ids in tokens {first} to {last}). {REMAKE}"
        )
