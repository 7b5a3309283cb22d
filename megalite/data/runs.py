"""The tokens of each BERT sample: runs of at most L tokens of one document, found by binary search.

A document of T tokens is cut into ceil(T / L) runs. The number of runs of all documents before it
is not known without reading their sizes, so documents get slots instead, whose total is known: a
split of D documents and T tokens has S = ceil(T / L) + D slots an epoch. Slot j lies at j * L +
offset on a line on which each document takes its number of tokens, and L more. So each document has
a slot for each of its runs, and at most one spare slot (the last document: two). A spare slot gives
the run around a random token of the split, which repeats that run. An epoch therefore has every run
at least once, and visits the slots in a random order of its own.

The borders between runs move from epoch to epoch within the room that the runs leave, and back to
the beginning of a sentence where the run still fits. Nothing is built or read at the start, and a
sample costs a few binary searches of the index at any size. Only when the sequences do not lie one
after another in the .bin file, their positions are summed first, 8 bytes each.
"""

from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from megalite.data.indexed import DatasetError, IndexedDataset
from megalite.data.permutation import Permutation, random_words


class Run(NamedTuple):
    """Tokens [start, stop) of a split, all of one document."""

    document: int
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Number of tokens."""
        return self.stop - self.start


class _Epoch(NamedTuple):
    offset: int
    """Of the first slot on the line, in [0, L)."""
    phase: int
    """In [0, 2^64): how far the borders of runs are moved within their room."""
    order: Permutation
    """Of the slots."""


def _ceil(dividend: int, divisor: int) -> int:
    return -(-dividend // divisor)


@dataclass(eq=False)
class SentenceRuns:
    """The runs of a split of an indexed dataset whose sequences are sentences.

    The order depends on the fields alone. Raises DatasetError when the split has no tokens.
    """

    indexed: IndexedDataset
    split_documents: tuple[int, int]
    """[first, last) document of the split."""
    max_tokens: int
    """L."""
    seed: int
    split: str
    across: bool = False
    """Treat the split as one document, so that runs cross the borders of documents."""

    def __post_init__(self):
        indexed = self.indexed
        first, last = self.split_documents
        self.stream = indexed.tokens(first, last)
        if len(self.stream) == 0:
            raise DatasetError(
                f"split '{self.split}' has no tokens in its {last - first} documents. "
                "Give it a larger share of --split, or use more data"
            )
        # Sequence at which each document starts, and byte at which each sequence starts.
        self._edges = indexed.document_indices[first : last + 1]
        self._offsets = indexed.offsets
        self._unit = indexed.dtype.itemsize
        if not indexed.contiguous:
            lengths = indexed.lengths[self._edges[0] : self._edges[-1]]
            self._offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]) * self._unit
            self._edges = self._edges - self._edges[0]
        self._origin = int(self._offsets[self._edges[0]])
        self._sequences = int(self._edges[-1])
        if self.across:
            self._edges = self._edges[[0, -1]]
        self.documents = len(self._edges) - 1
        self.per_epoch = _ceil(len(self.stream), self.max_tokens) + self.documents
        """S, slots in one epoch."""
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    def __call__(self, epoch: int, position: int, spare: int) -> Run:
        """The run at a position of an epoch, 0 <= position < per_epoch.

        spare: random in [0, 2^64), selects the token for a spare slot.
        """
        current = self._epoch(epoch)
        # The document that the slot lies in, and the index of the slot within it.
        slot = current.order(position)
        on_line = slot * self.max_tokens + current.offset
        document = bisect_right(range(self.documents), on_line, key=self._line_start) - 1
        before = self._line_start(document) - current.offset
        index = slot - _ceil(before, self.max_tokens)
        # A spare slot: the run around a random token.
        if index >= self._runs(document):
            token = spare * len(self.stream) >> 64
            document = bisect_right(range(self.documents), token, key=self._edge) - 1
            start = self._edge(document)
            size = self._edge(document + 1) - start
            index = (token - start) * self._runs(document) // size
        start = self._border(document, index, current.phase)
        return Run(document, start, self._border(document, index + 1, current.phase))

    def sentence(self, document: int, token: int) -> tuple[int, int]:
        """[start, stop) of a document's sentence that has this token; positions in the split."""
        sequences = range(int(self._edges[document]), int(self._edges[document + 1]))
        sequence = sequences.start + bisect_right(sequences, token, key=self._start) - 1
        return self._start(sequence), self._start(sequence + 1)

    def end(self, document: int) -> int:
        """Position after the last token of a document."""
        return self._edge(document + 1)

    def _make_epoch(self, number: int) -> _Epoch:
        words = random_words(self.seed, "bert runs", self.split, number)
        return _Epoch(words[0] % self.max_tokens, words[1], Permutation(self.per_epoch, words[2:]))

    def _start(self, sequence: int) -> int:
        """First token of a sequence, or the number of tokens after the last sequence."""
        if sequence == self._sequences:
            return len(self.stream)
        return (int(self._offsets[sequence]) - self._origin) // self._unit

    def _edge(self, document: int) -> int:
        """First token of a document, or the number of tokens after the last document."""
        return self._start(int(self._edges[document]))

    def _line_start(self, document: int) -> int:
        """Position at which a document begins on the line of slots."""
        return self._edge(document) + document * self.max_tokens

    def _runs(self, document: int) -> int:
        """Runs of a document."""
        return _ceil(self._edge(document + 1) - self._edge(document), self.max_tokens)

    def _border(self, document: int, index: int, phase: int) -> int:
        """First token of run `index` of a document, or the end of its last run.

        Runs are `pace` tokens apart, halfway between equal sizes and L, and the first is shorter by
        an amount that the phase decides. One half of the room to L is for the phase, the other for
        moving a border back to the beginning of a sentence.
        """
        start = self._edge(document)
        stop = self._edge(document + 1)
        runs = self._runs(document)
        if index in (0, runs):
            return stop if index else start
        pace = (_ceil(stop - start, runs) + self.max_tokens) // 2
        shortest = stop - start - (runs - 1) * pace
        first_run = shortest + ((pace - shortest + 1) * phase >> 64)
        border = start + first_run + (index - 1) * pace
        sentence, _ = self.sentence(document, border)
        if border - sentence <= self.max_tokens - pace:
            return sentence
        return border
