"""Documents of an indexed dataset as one flat sequence of tokens."""

import numpy as np


class TokenStream:
    """A contiguous range of a dataset's tokens. `len()` is the number of tokens.

    Args:
        dataset: an IndexedDataset or MockSentences, whose sequences are contiguous.
        start, stop: the range [start, stop) of token positions in the dataset.
        name: identifies the range in the fingerprint.
    """

    def __init__(self, dataset, start: int, stop: int, name: str):
        self.dtype = dataset.dtype
        self._dataset = dataset
        self._ids = dataset.ids[start:stop]
        self._name = name

    def __len__(self) -> int:
        return len(self._ids)

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Token ids [start, stop) of the stream, 0 <= start <= stop <= len, in the file's dtype.

        The result is a view of the file.
        """
        return self._ids[start:stop]

    def fingerprint(self) -> str:
        """Identifies the contents: the dataset's fingerprint and the name of the range."""
        return f"{self._dataset.fingerprint()}[{self._name}]"


class GatheredStream(TokenStream):
    """Sequences of a dataset, in any order, laid end to end. `len()` is the number of tokens.

    Memory: the order, and 8 bytes for each of its sequences.

    Args:
        dataset: an IndexedDataset, whose sequences may lie anywhere in its .bin file.
        order: indices of sequences, integers [n], in any order, repeated or not.
        name: identifies the order in the fingerprint.
    """

    def __init__(self, dataset, order: np.ndarray, name: str):
        super().__init__(dataset, 0, len(dataset.ids), name)
        self._order = order
        self._starts = np.zeros(len(order) + 1, np.int64)
        np.cumsum(dataset.lengths[order], out=self._starts[1:])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Token ids [start, stop) of the stream, 0 <= start <= stop <= len, in the file's dtype.

        The result is a view of the file when all tokens belong to one sequence, else a copy.
        """
        stop = len(self) if stop is None else stop
        # The sequences first .. last - 1 of the order hold these tokens.
        first = int(self._starts.searchsorted(start, side="right")) - 1
        last = int(self._starts.searchsorted(stop, side="left"))
        starts = self._starts[first : last + 1]
        # Token t of the stream lies at t + shift in the file, with one shift for each sequence.
        positions = self._dataset.offsets[self._order[first:last]] // self.dtype.itemsize
        shifts = positions - starts[:-1]
        if last - first == 1:
            return self._ids[start + shifts[0] : stop + shifts[0]]
        edges = starts.clip(start, stop)
        return self._ids[np.repeat(shifts, edges[1:] - edges[:-1]) + np.arange(start, stop)]


"""The tokens that samples are cut from."""
