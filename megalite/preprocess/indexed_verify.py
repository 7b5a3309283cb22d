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
    largest: list[int] = []
    problems = list(islice(_problems(data, largest, progress), MAX_PROBLEMS))
    return Verification(problems, max(largest, default=None))


def _problems(data: IndexedDataset, largest: list[int], progress: Callable) -> Iterator[str]:
    """The problems, in the order of the checks. Appends the largest id of each chunk to a list."""
    # Compare with the description.
    vocab_size = None
    try:
        if info := DatasetInfo.read(data.prefix):
            vocab_size = info.vocab_size
            if (info.documents, info.tokens) != (data.num_documents, data.num_tokens):
                yield (
                    f"{data.prefix}.json describes {info.documents:,} documents and "
                    f"{info.tokens:,} tokens, but the files hold {data.num_documents:,} and "
                    f"{data.num_tokens:,}. They do not belong together, or are damaged. {REMAKE}"
                )
    except DatasetError as error:
        yield str(error)
    # Run each check over all entries that it applies to, in chunks.
    checks = [
        (data.sequence_problems, len(data)),
        (data.boundary_problems, len(data.document_indices)),
        (lambda sequences: _gaps(data, sequences), len(data) if data.contiguous else 0),
        (lambda tokens: _wrong_ids(data, tokens, vocab_size, largest), len(data.ids)),
    ]
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


def _wrong_ids(
    data: IndexedDataset, tokens: np.ndarray, vocab_size: int | None, largest: list[int]
) -> Iterator[str]:
    """At most one message for the ids at these consecutive positions."""
    first = int(tokens[0])
    last = int(tokens[-1])
    ids = data.ids[first : last + 1]
    largest.append(int(ids.max()))
    wrong = ids < 0
    allowed = "ids are at least 0"
    if vocab_size is not None:
        wrong |= ids >= vocab_size
        allowed = f"{data.prefix}.json describes a vocabulary of {vocab_size} entries"
    wrong = np.flatnonzero(wrong)
    if len(wrong):
        yield (
            f"{data.bin_path}: id {ids[wrong[0]]} at token {first + wrong[0]}, but {allowed} "
            f"({len(wrong)} such ids in tokens {first} to {last}). {REMAKE}"
        )
