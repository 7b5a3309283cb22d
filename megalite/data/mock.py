"""Synthetic tokens for trials without data: counter-based random, with learnable structure."""

from math import gcd

import numpy as np

from megalite.data.indexed import IndexedDataset
from megalite.data.masking import SpecialIds
from megalite.kernels.philox import counters, key_of, philox4x32

REPEAT_PROBABILITY = 0.75
"""Probability that a token is a function of the one before it."""


class MockDataset:
    """Samples of s + 1 tokens: `dataset[i]` for any i >= 0, a function of (vocab_size, s, seed,
    split) and i alone.

    With probability 3/4 a token is (multiplier * previous + increment) % vocab_size, otherwise it
    is uniformly random. A model that learns the rule reaches a loss of about 0.25 * ln(vocab_size)
    + 0.56; a uniform guess has a loss of ln(vocab_size).
    """

    def __init__(self, vocab_size: int, seq_length: int, seed: int, split: str):
        if not 2 <= vocab_size < 2**31:
            raise ValueError(f"--mock-data needs 2 <= --vocab-size < 2^31, not {vocab_size}")
        self.vocab_size = vocab_size
        self.seq_length = seq_length
        self.seed = seed
        self.split = split
        # The largest factor up to 0.618 v that has an inverse modulo v.
        self.multiplier = int(vocab_size * 0.618) or 1
        while gcd(self.multiplier, vocab_size) != 1:
            self.multiplier -= 1
        self.increment = vocab_size // 3 + 1
        self._factors, self._terms = self._powers_of_the_rule()

    def _powers_of_the_rule(self) -> np.ndarray:
        """a, c: int64 [2, s + 1]. The rule applied k times is x -> (a[k] * x + c[k]) % v."""
        powers = [(1, 0)]
        for _ in range(self.seq_length):
            a, c = powers[-1]
            a = a * self.multiplier % self.vocab_size
            c = (c * self.multiplier + self.increment) % self.vocab_size
            powers.append((a, c))
        return np.array(powers, dtype=np.int64).T

    def __getitem__(self, i: int) -> np.ndarray:
        """Sample i, int64 [s + 1]. Raises IndexError below 0."""
        if i < 0:
            raise IndexError(f"sample {i}: samples count from 0")
        length = self.seq_length + 1
        key = key_of(self.seed, "mock data", self.split)
        words = philox4x32(counters(int(i) * length, length), key)
        fresh = words[:, 0].astype(np.int64) % self.vocab_size
        restart = words[:, 1] >= REPEAT_PROBABILITY * 2**32
        restart[0] = True
        # Each token is the rule applied to the last random one, as often as it lies behind it.
        position = np.arange(length)
        last_restart = np.maximum.accumulate(np.where(restart, position, 0))
        steps = position - last_restart
        tokens = self._factors[steps] * fresh[last_restart] + self._terms[steps]
        return tokens % self.vocab_size

    def fingerprint(self) -> str:
        """Identifies the vocabulary size and the split."""
        return f"mock v={self.vocab_size} split={self.split}"


class MockSentences(IndexedDataset):
    """A small synthetic dataset of documents and sentences in memory.

    256 documents of 1 to 256 tokens, in sentences of about 12, by the rule of MockDataset. Ids
    below 4 are special, and a third of the others continue a word.

    Raises ValueError when the vocabulary has fewer than 2 ids that are not special.
    """

    special = SpecialIds(pad=0, cls=1, sep=2, mask=3)
    num_special = 4
    """Ids below this are special; the text has none of them."""
    dtype = np.dtype("<i4")
    contiguous = True
    DOCUMENTS = 256
    MOST_TOKENS = 256
    """Of a document."""

    def __init__(self, vocab_size: int, seed: int, split: str):
        rows = MockDataset(vocab_size - self.num_special, self.MOST_TOKENS - 1, seed, split)
        self.vocab_size = vocab_size
        self.split = split
        self.starts_word = np.arange(vocab_size) % 3 > 0
        # Random words for each document and token.
        shape = (self.DOCUMENTS, self.MOST_TOKENS)
        numbers = counters(0, shape[0] * shape[1])
        words = philox4x32(numbers, key_of(seed, "mock sentences", split)).reshape(*shape, 4)
        # Document sizes, and the tokens that begin a sentence.
        sizes = 1 + words[:, 0, 0] % self.MOST_TOKENS
        within = np.arange(self.MOST_TOKENS) < sizes[:, None]
        begins = words[:, :, 1] % 12 == 0
        begins[:, 0] = True
        first = np.flatnonzero(begins[within])
        # The arrays of an indexed dataset.
        documents = [self.num_special + rows[i][:size] for i, size in enumerate(sizes)]
        self.ids = np.concatenate(documents).astype(self.dtype)
        self.offsets = first * self.dtype.itemsize
        self.lengths = np.diff(first, append=len(self.ids)).astype(np.int32)
        bounds = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        self.document_indices = np.searchsorted(first, bounds)

    def fingerprint(self) -> str:
        """Identifies the vocabulary size and the split."""
        return f"mock sentences v={self.vocab_size} split={self.split}"
