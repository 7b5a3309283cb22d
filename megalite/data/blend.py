"""Blending datasets by weight: which source gives sample i, and how many it gave before, computed, not stored."""

import hashlib
import math
from collections.abc import Sequence

import numpy as np

MOST = 1 << 50
"""Samples that counts stay exact for in float64 arithmetic."""


class Blend:
    """Shares out samples 0, 1, 2, ... among k weighted sources.

    Each sample goes to the source that is furthest behind its weight, in the sense of Webster's method of
    apportionment: the one with the largest w / (2 c + 1), where c is what it has given; ties go to the first. After n
    samples a source has given w n / (sum of weights), within k / 2 + 1. Any place in the sequence is found directly,
    with a few correctly rounded operations of float64, which are the same on every machine.

    Raises ValueError when there is no weight, or one is not a positive number.
    """

    def __init__(self, weights: Sequence[float]):
        if not len(weights) or not all(0 < weight < math.inf for weight in weights):
            raise ValueError(f"a blend needs weights above 0, not {list(weights)}")
        total = math.fsum(weights)
        self.shares = np.array([weight / total for weight in weights])
        """float64 [k], sum 1."""
        self._last = (0, np.zeros(len(weights), np.int64))  # replaced as a whole: other threads see one or the other

    def counts(self, n: int) -> np.ndarray:
        """int64 [k]: samples of each source among the first n, 0 <= n <= 2^50."""
        last, counts = self._last
        if not last <= n <= last + 2 * len(counts):
            if not 0 <= n <= MOST:
                raise ValueError(f"sample {n} of a blend: needs 0 to {MOST}")
            counts = self._at_most(n)
        counts = counts.copy()
        for _ in range(n - int(counts.sum())):
            counts[self._next(counts)] += 1
        self._last = n, counts
        return counts.copy()

    def __getitem__(self, i: int) -> tuple[int, int]:
        """(source, number of the sample within the source) of sample i >= 0."""
        counts = self.counts(i)
        source = self._next(counts)
        return source, int(counts[source])

    def _next(self, counts: np.ndarray) -> int:
        return int(np.argmax(self.shares / (2 * counts + 1)))

    def _at_most(self, n: int) -> np.ndarray:
        """Counts that no source's count among the first n is below, with a sum at most a few k below n.

        The counts of Webster's method are w x rounded, for some x. Rounding moves the sum of k numbers by at most
        k / 2, so x >= n - k / 2, and a count is at least w (n - k / 2) - 1 / 2. One more is taken off for float64's
        rounding.
        """
        least = np.floor(self.shares * (n - len(self.shares) / 2) - 1.5)
        return np.maximum(least, 0).astype(np.int64)


class BlendedDataset:
    """Samples of several datasets by weight: `dataset[i]` for any i >= start.

    Args:
        datasets: `datasets[j][i]` gives sample i of source j.
        weights: one for each.
        start: number of the first sample of this blend; the samples before it came from another.
        consumed: samples of each source that were used by then. Each goes on from there. None: none were.
    """

    def __init__(
        self, datasets: Sequence, weights: Sequence[float], start: int = 0, consumed: Sequence[int] | None = None
    ):
        self.datasets, self.start = list(datasets), start
        self.consumed = [0] * len(self.datasets) if consumed is None else list(consumed)
        if not len(self.datasets) == len(weights) == len(self.consumed):
            raise ValueError(
                f"{len(self.datasets)} datasets, {len(weights)} weights and {len(self.consumed)} counts do not match"
            )
        self._blend = Blend(weights)

    def __getitem__(self, i: int):
        """Sample i of the run. Raises IndexError for one before `start`."""
        if i < self.start:
            raise IndexError(f"sample {i}: this blend begins at sample {self.start}")
        source, number = self._blend[i - self.start] if len(self.datasets) > 1 else (0, i - self.start)
        return self.datasets[source][self.consumed[source] + number]

    def consumed_at(self, i: int) -> list[int]:
        """Samples of each source used before sample i >= start of the run."""
        return [used + int(count) for used, count in zip(self.consumed, self._blend.counts(i - self.start))]

    def fingerprint(self) -> str:
        """Tells the content of the sources from other content."""
        return hashlib.sha256("\n".join(dataset.fingerprint() for dataset in self.datasets).encode()).hexdigest()
