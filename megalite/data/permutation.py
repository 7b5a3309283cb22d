"""Random permutations of any size in constant memory."""

from math import isqrt

import numpy as np

from megalite.kernels.philox import counters, key_of, philox4x32

MASK = 0xFFFFFFFFFFFFFFFF


class Permutation:
    """A random permutation of 0 .. n - 1 in constant memory, exact for any n up to 2^62.

    A Feistel network over the pairs in Z_rows x Z_columns, rows * columns >= n: each round adds to
    one half a keyed hash of the other, which is invertible, so the network permutes all the pairs.
    A result of n or more is permuted again until it falls below n (cycle walking), which leaves a
    permutation of 0 .. n - 1. Fewer than `rows` results exceed n, so this is rare.

    Raises ValueError for another n or number of keys.
    """

    ROUNDS = 8

    def __init__(self, n: int, round_keys: list[int]):
        if not 1 <= n <= 2**62 or len(round_keys) != self.ROUNDS:
            raise ValueError(
                f"a permutation needs 1 <= n <= 2^62 and {self.ROUNDS} keys, not {n} and "
                f"{len(round_keys)}"
            )
        self.n = n
        self._rows = isqrt(n - 1) + 1
        self._columns = -(-n // self._rows)
        self._keys = round_keys

    def __call__(self, i):
        """The image of i, 0 <= i < n: an int for an int, a uint64 array for an array of
        integers."""
        if np.ndim(i) == 0:
            i = self._permute(int(i))
            while i >= self.n:
                i = self._permute(i)
            return i
        i = self._permute(np.asarray(i).astype(np.uint64))
        while (outside := i >= self.n).any():
            i[outside] = self._permute(i[outside])
        return i

    def _permute(self, i):
        """All rounds of the network, for an int or a uint64 array below rows * columns."""
        left = i // self._columns
        right = i % self._columns
        for number, key in enumerate(self._keys):
            if number % 2 == 0:
                left = (left + _hash(right ^ key)) % self._rows
            else:
                right = (right + _hash(left ^ key)) % self._columns
        return left * self._columns + right


def random_words(*what: int | str) -> list[int]:
    """Ten random numbers of 64 bits, a function of the arguments: enough for a permutation."""
    return philox4x32(counters(0, 5), key_of(*what)).reshape(-1).view("<u8").tolist()


def _hash(x):
    """A 63-bit hash of an int or of a uint64 array; a sum with one half stays below 2^64."""
    x = (x * 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 32)) * 0xD6E8FEB86659FD93) & MASK
    x = ((x ^ (x >> 32)) * 0xD6E8FEB86659FD93) & MASK
    return (x ^ (x >> 32)) >> 1
