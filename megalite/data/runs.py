"""Which tokens of which document make a sample: runs of at most L tokens, found by arithmetic and binary search.

A document of T tokens is cut into ceil(T / L) runs. How many runs the documents before it give is not known without
looking at all of them, so a document gets slots instead, whose number has a sum that is known: over a whole split of D
documents and T tokens there are S = ceil(T / L) + D slots an epoch, slot j at j * L + offset on a line on which each
document takes as much room as it has tokens, and L more. So each has a slot for each of its runs, and at most one to
spare (the last one: two). A spare slot gives the run around a random token of the split, which repeats it. An epoch
therefore has every run at least once, and visits the slots in a random order of its own.

Where a document is cut moves from epoch to epoch within the room that its runs leave, and back to the beginning of a
sentence where the run still fits. Nothing is built or read at the start, and each sample costs a few binary searches of
the index, whatever its size. Only where the sequences do not lie one after another in the .bin file, their places are
summed up first, 8 bytes each.
"""

from bisect import bisect_right
from typing import NamedTuple

import numpy as np

from megalite.data.gpt import Permutation
from megalite.data.indexed import DatasetError, IndexedDataset
from megalite.kernels.philox import counters, key_of, philox4x32


class Run(NamedTuple):
    """Tokens [start, stop) of a split, all of one document."""

    document: int
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Its tokens."""
        return self.stop - self.start


class _Epoch(NamedTuple):
    number: int
    offset: int
    """Of the first slot on the line, in [0, L)."""
    phase: int
    """In [0, 2^64): where in their room the cuts lie."""
    order: Permutation
    """Of the slots."""


def _ceil(dividend: int, divisor: int) -> int:
    return -(-dividend // divisor)


class SentenceRuns:
    """The runs of a split of an indexed dataset whose sequences are sentences.

    Args:
        indexed: the dataset.
        documents: [first, last) document of the split.
        max_tokens: L.
        seed, split_name: with the above, all that the order depends on.
        across: take the split as one document: runs go on across the borders of documents.

    Raises DatasetError when the split has no tokens.
    """

    def __init__(
        self,
        indexed: IndexedDataset,
        documents: tuple[int, int],
        max_tokens: int,
        seed: int,
        split_name: str,
        across: bool = False,
    ):
        first, last = documents
        self.stream = indexed.tokens(first, last)
        if len(self.stream) == 0:
            raise DatasetError(
                f"split '{split_name}' has no tokens in its {last - first} documents. "
                "Give it a larger share of --split, or use more data"
            )
        self.max_tokens, self.seed, self.split_name = max_tokens, seed, split_name
        self._edges = indexed.document_indices[first : last + 1]
        self._unit = indexed.dtype.itemsize
        self._offsets = indexed.offsets
        if not indexed.contiguous:
            lengths = indexed.lengths[self._edges[0] : self._edges[-1]]
            self._offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]) * self._unit
            self._edges = self._edges - self._edges[0]
        self._origin, self._sequences = int(self._offsets[self._edges[0]]), int(self._edges[-1])
        if across:
            self._edges = self._edges[[0, -1]]
        self.documents = len(self._edges) - 1
        self.per_epoch = _ceil(len(self.stream), max_tokens) + self.documents
        """S, slots in one epoch."""
        self._epoch: _Epoch | None = None

    def __call__(self, epoch: int, position: int, spare: int) -> Run:
        """The run at a position of an epoch, 0 <= position < per_epoch. `spare`, random in [0, 2^64), picks the token
        for a spare slot."""
        if self._epoch is None or self._epoch.number != epoch:
            self._epoch = self._order(epoch)
        _, offset, phase, order = self._epoch
        slot = order(position)
        place = slot * self.max_tokens + offset
        document = bisect_right(range(self.documents), place, key=self._place) - 1
        number = slot - _ceil(self._place(document) - offset, self.max_tokens)
        if number >= self._runs(document):
            token = spare * len(self.stream) >> 64
            document = bisect_right(range(self.documents), token, key=self._edge) - 1
            start, stop = self._edge(document), self._edge(document + 1)
            number = (token - start) * self._runs(document) // (stop - start)
        return Run(
            document, self._cut(document, number, phase), self._cut(document, number + 1, phase)
        )

    def sentence(self, document: int, token: int) -> tuple[int, int]:
        """[start, stop) of the sentence that has this token, both tokens of the split."""
        sequences = range(int(self._edges[document]), int(self._edges[document + 1]))
        sequence = sequences.start + bisect_right(sequences, token, key=self._start) - 1
        return self._start(sequence), self._start(sequence + 1)

    def end(self, document: int) -> int:
        """The token after the last one of a document."""
        return self._edge(document + 1)

    def _order(self, epoch: int) -> _Epoch:
        key = key_of(self.seed, "bert runs", self.split_name, epoch)
        numbers = [int(n) for n in philox4x32(counters(0, 5), key).reshape(-1).view("<u8")]
        return _Epoch(
            epoch,
            numbers[0] % self.max_tokens,
            numbers[1],
            Permutation(self.per_epoch, numbers[2:]),
        )

    def _start(self, sequence: int) -> int:
        """First token of a sequence, or after the last one the number of tokens."""
        if sequence == self._sequences:
            return len(self.stream)
        return (int(self._offsets[sequence]) - self._origin) // self._unit

    def _edge(self, document: int) -> int:
        """First token of a document, or after the last one the number of tokens."""
        return self._start(int(self._edges[document]))

    def _place(self, document: int) -> int:
        """Where a document begins on the line of slots."""
        return self._edge(document) + document * self.max_tokens

    def _runs(self, document: int) -> int:
        return _ceil(self._edge(document + 1) - self._edge(document), self.max_tokens)

    def _cut(self, document: int, number: int, phase: int) -> int:
        """Where run `number` of a document begins, or after its last run where that ends.

        Runs are `pace` tokens apart, halfway between the even share and L, and the first is shorter by what the phase
        says. The one half of the room to L goes to the phase, the other to moving a cut back to a sentence's beginning.
        """
        start, stop, runs = self._edge(document), self._edge(document + 1), self._runs(document)
        if number in (0, runs):
            return start if number == 0 else stop
        pace = (_ceil(stop - start, runs) + self.max_tokens) // 2
        shortest = stop - start - (runs - 1) * pace
        cut = start + shortest + ((pace - shortest + 1) * phase >> 64) + (number - 1) * pace
        sentence = self.sentence(document, cut)[0]
        return sentence if cut - sentence <= self.max_tokens - pace else cut
