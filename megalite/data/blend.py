"""Blends of datasets by weight: the source of a sample, and its index there, by computation."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MOST = 1 << 50
"""Samples up to which counts are exact in float64 arithmetic."""


class Blend:
    """Assigns samples 0, 1, 2, ... to k weighted sources.

    Each sample comes from the source that is furthest behind its weight, by Webster's method of
    apportionment: the one with the largest w / (2 c + 1), with c the samples it has given; ties go
    to the first. After n samples a source has given w n / (sum of weights), within k / 2 + 1. Any
    sample is found directly, with a few correctly rounded float64 operations, which give the same
    result on every machine.

    Raises ValueError when there is no weight, or one is not a positive number.
    """

    def __init__(self, weights: Sequence[float]):
        if not len(weights) or not all(0 < weight < math.inf for weight in weights):
            raise ValueError(f"a blend needs weights above 0, not {list(weights)}")
        total = math.fsum(weights)
        self.shares = np.array([weight / total for weight in weights])
        """float64 [k], sum 1."""
        # (n, counts after n samples) of the last look-up. Replaced as a whole, so that another
        # thread sees one pair or the other.
        self._last = (0, np.zeros(len(weights), np.int64))

    def counts(self, n: int) -> np.ndarray:
        """Samples of each source among the first n, int64 [k], 0 <= n <= 2^50.

        Computed without those before, unless they follow the last look-up. In the words of
        apportionment, sample c of a source is a seat of worth w / (2 c + 1), and the blend takes
        seats from the worthiest down. The counts are w x rounded, for some x. Rounding moves the
        sum of k numbers by at most k / 2, so x is within k / 2 of n, and a count within 1 / 2 of
        w (n - k / 2) .. w (n + k / 2); one more on either side allows for float64 rounding. All
        seats below that range are taken, and the worthiest of those in it; of equal ones the first.
        """
        last, counts = self._last
        if last == n:
            return counts.copy()
        if not 0 <= n <= MOST:
            raise ValueError(f"sample {n} of a blend: needs 0 to {MOST}")
        k = len(self.shares)
        # The range of possible counts of each source.
        fewest = np.floor(self.shares * (n - k / 2) - 1.5)
        fewest = np.maximum(fewest, 0).astype(np.int64)
        most = np.ceil(self.shares * (n + k / 2) + 1.5).astype(np.int64)
        # All seats within these ranges: the source, the sample and the worth of each.
        open_seats = most - fewest
        sources = np.repeat(np.arange(k), open_seats)
        first = np.cumsum(open_seats) - open_seats
        seats = np.arange(len(sources)) - np.repeat(first - fewest, open_seats)
        worth = self.shares[sources] / (2 * seats + 1)
        # Take the worthiest of them.
        taken = np.argsort(-worth, kind="stable")[: n - int(fewest.sum())]
        return fewest + np.bincount(sources[taken], minlength=k)

    def __getitem__(self, i: int) -> tuple[int, int]:
        """(source, index of the sample within the source) of sample i >= 0."""
        counts = self.counts(i)
        source = int((self.shares / (2 * counts + 1)).argmax())
        index = int(counts[source])
        counts[source] += 1
        self._last = (i + 1, counts)
        return source, index


@dataclass(eq=False)
class BlendedDataset:
    """Samples of several datasets by weight: `dataset[i]` for any i >= start.

    Raises ValueError when the numbers of datasets, weights and counts differ.
    """

    datasets: Sequence
    """`datasets[j][i]` gives sample i of source j."""
    weights: Sequence[float]
    """One for each dataset."""
    start: int = 0
    """Index in the run of the first sample of this blend; earlier ones came from another."""
    consumed: Sequence[int] | None = None
    """Samples of each source that were used before `start`; each continues from there. None: no
    samples were used."""

    def __post_init__(self):
        if self.consumed is None:
            self.consumed = [0] * len(self.datasets)
        if not len(self.datasets) == len(self.weights) == len(self.consumed):
            raise ValueError(
                f"{len(self.datasets)} datasets, {len(self.weights)} weights and "
                f"{len(self.consumed)} counts do not match"
            )
        self._blend = Blend(self.weights)

    def __getitem__(self, i: int):
        """Sample i of the run. Raises IndexError for one before `start`."""
        if i < self.start:
            raise IndexError(f"sample {i}: this blend begins at sample {self.start}")
        source, index = 0, i - self.start
        if len(self.datasets) > 1:
            source, index = self._blend[index]
        return self.datasets[source][self.consumed[source] + index]
