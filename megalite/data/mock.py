"""Tokens made up on the spot, for trials without data: counted random numbers with structure that can be learned."""

from math import gcd

import numpy as np

from megalite.data.masking import SpecialIds
from megalite.data.streams import TokenStream
from megalite.kernels.philox import counters, key_of, philox4x32

REPEAT_PROBABILITY = 0.75
"""Probability that a token follows from the one before it."""


class MockDataset:
    """Samples of s + 1 tokens: `dataset[i]` for any i >= 0, a function of (vocab_size, s, seed, split) and i alone.

    With probability 3/4 a token is (multiplier * previous + increment) % vocab_size, otherwise it is uniformly random.
    A model that learns the rule reaches a loss of about 0.25 * ln(vocab_size) + 0.56; guessing costs ln(vocab_size).
    """

    def __init__(self, vocab_size: int, seq_length: int, seed: int, split: str):
        if not 2 <= vocab_size < 2**31:
            raise ValueError(f"--mock-data needs 2 <= --vocab-size < 2^31, not {vocab_size}")
        self.vocab_size, self.seq_length, self.seed, self.split = (
            vocab_size,
            seq_length,
            seed,
            split,
        )
        self.multiplier = next(
            a for a in range(int(vocab_size * 0.618) or 1, 0, -1) if gcd(a, vocab_size) == 1
        )
        self.increment = vocab_size // 3 + 1
        self._powers = self._powers_of_the_rule()

    def _powers_of_the_rule(self) -> tuple[np.ndarray, np.ndarray]:
        """a, c, int64 [s + 1] each: the rule applied k times is x -> (a[k] * x + c[k]) % v."""
        powers = [(1, 0)]
        for _ in range(self.seq_length):
            a, c = powers[-1]
            powers.append(
                (
                    a * self.multiplier % self.vocab_size,
                    (c * self.multiplier + self.increment) % self.vocab_size,
                )
            )
        return tuple(np.array(powers, dtype=np.int64).T)

    def __getitem__(self, i: int) -> np.ndarray:
        """Sample i, int64 [s + 1]. Raises IndexError below 0."""
        if i < 0:
            raise IndexError(f"sample {i}: samples count from 0")
        length = self.seq_length + 1
        words = philox4x32(
            counters(int(i) * length, length), key_of(self.seed, "mock data", self.split)
        )
        fresh = words[:, 0].astype(np.int64) % self.vocab_size
        restart = words[:, 1] >= REPEAT_PROBABILITY * 2**32
        restart[0] = True
        position = np.arange(length)
        last_restart = np.maximum.accumulate(np.where(restart, position, 0))
        a, c = (power[position - last_restart] for power in self._powers)
        return (a * fresh[last_restart] + c) % self.vocab_size

    def fingerprint(self) -> str:
        """Tells this data from other mock data."""
        return f"mock v={self.vocab_size} split={self.split}"


class MockSentences:
    """A small indexed dataset of made-up documents and sentences, in memory: what BertDataset reads of one.

    256 documents of 1 to 256 tokens, in sentences of about 12, by the rule of MockDataset; ids below 4 are special, and
    a third of the others go on with a word. Raises ValueError when the vocabulary has less than 2 others.
    """

    special = SpecialIds(pad=0, cls=1, sep=2, mask=3)
    num_special = 4
    """Ids below this are special; the text has none of them."""
    dtype = np.dtype("<i4")
    contiguous = True
    num_documents = MOST_TOKENS = 256

    def __init__(self, vocab_size: int, seed: int, split: str):
        rows = MockDataset(vocab_size - self.num_special, self.MOST_TOKENS - 1, seed, split)
        self.vocab_size, self.split = vocab_size, split
        self.starts_word = np.arange(vocab_size) % 3 > 0
        shape = (self.num_documents, self.MOST_TOKENS)
        words = philox4x32(
            counters(0, shape[0] * shape[1]), key_of(seed, "mock sentences", split)
        ).reshape(*shape, 4)
        sizes = 1 + words[:, 0, 0] % self.MOST_TOKENS
        within = np.arange(self.MOST_TOKENS) < sizes[:, None]
        begins = words[:, :, 1] % 12 == 0
        begins[:, 0] = True
        first = np.flatnonzero(begins[within])  # tokens that begin a sentence
        self.ids = np.concatenate(
            [self.num_special + rows[i][: sizes[i]] for i in range(len(sizes))]
        ).astype(self.dtype)
        self.offsets = first * self.dtype.itemsize
        self.lengths = np.diff(first, append=len(self.ids)).astype(np.int32)
        self.document_indices = np.searchsorted(
            first, np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        )

    def tokens(self, first_document: int, last_document: int) -> TokenStream:
        """The tokens of documents [first, last) as one stream."""
        edges = np.append(self.offsets // self.dtype.itemsize, len(self.ids))
        start, stop = (
            int(edges[self.document_indices[i]]) for i in (first_document, last_document)
        )
        return TokenStream(self, start, stop, f"{first_document}:{last_document}")

    def fingerprint(self) -> str:
        """Tells this data from other mock data."""
        return f"mock sentences v={self.vocab_size} split={self.split}"
