"""TrainingComponents of an indexed dataset as flat sequences of tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from megalite.data.indexed import IndexedDataset


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
