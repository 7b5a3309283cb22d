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
        self._last = (
            0,
            np.zeros(len(weights), np.int64),
        )  # replaced as a whole: other threads see one or the other

    def counts(self, n: int) -> np.ndarray:
        """int64 [k]: samples of each source among the first n, 0 <= n <= 2^50."""
        return self._counts(n).copy()

    def __getitem__(self, i: int) -> tuple[int, int]:
        """(source, number of the sample within the source) of sample i >= 0."""
        counts = self._counts(i)
        source = int((self.shares / (2 * counts + 1)).argmax())
        after = counts.copy()
        after[source] += 1
        self._last = i + 1, after
        return source, int(counts[source])

    def _counts(self, n: int) -> np.ndarray:
        last, counts = self._last
        return counts if last == n else self._search(n)

    def _search(self, n: int) -> np.ndarray:
        """The counts after n samples, without those before.

        Sample c of a source is a seat worth w / (2 c + 1), and the blend takes seats from the worthiest down. The
        counts are w x rounded, for some x. Rounding moves the sum of k numbers by at most k / 2, so x is within k / 2
        of n, and a count within 1 / 2 of w (n - k / 2) .. w (n + k / 2); one more on either side is for float64's
        rounding. All seats below are taken, and of those between, the worthiest, of equals the first.
        """
        if not 0 <= n <= MOST:
            raise ValueError(f"sample {n} of a blend: needs 0 to {MOST}")
        k = len(self.shares)
        fewest = np.maximum(np.floor(self.shares * (n - k / 2) - 1.5), 0).astype(np.int64)
        between = np.ceil(self.shares * (n + k / 2) + 1.5).astype(np.int64) - fewest
        sources = np.repeat(np.arange(k), between)
        seats = np.arange(len(sources)) - np.repeat(np.cumsum(between) - between - fewest, between)
        worth = self.shares[sources] / (2 * seats + 1)
        taken = np.argsort(-worth, kind="stable")[: n - int(fewest.sum())]
        return fewest + np.bincount(sources[taken], minlength=k)


class BlendedDataset:
    """Samples of several datasets by weight: `dataset[i]` for any i >= start.

    Args:
        datasets: `datasets[j][i]` gives sample i of source j.
        weights: one for each.
        start: number of the first sample of this blend; the samples before it came from another.
        consumed: samples of each source that were used by then. Each goes on from there. None: none were.
    """

    def __init__(
        self,
        datasets: Sequence,
        weights: Sequence[float],
        start: int = 0,
        consumed: Sequence[int] | None = None,
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
        source, number = (
            self._blend[i - self.start] if len(self.datasets) > 1 else (0, i - self.start)
        )
        return self.datasets[source][self.consumed[source] + number]

    def consumed_at(self, i: int) -> list[int]:
        """Samples of each source used before sample i >= start of the run."""
        return [
            used + int(count)
            for used, count in zip(self.consumed, self._blend.counts(i - self.start))
        ]

    def fingerprint(self) -> str:
        """Tells the content of the sources from other content."""
        return hashlib.sha256(
            "\n".join(dataset.fingerprint() for dataset in self.datasets).encode()
        ).hexdigest()
