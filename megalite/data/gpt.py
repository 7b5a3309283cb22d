"""GPT samples: windows over a stream of tokens, in an order that is computed, not stored.

A stream of T tokens gives W = (T - s) // s windows an epoch. Each epoch starts at an offset of its
own in [0, s), so that the borders between windows move, and visits its windows in a random order of
its own. Offset and order are functions of (seed, split, epoch): no index is built or held in
memory, and the number of iterations, the batch size and the layout do not matter.
"""

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise

import numpy as np

from megalite.data.indexed import DatasetError, IndexedDataset, check_ids
from megalite.data.permutation import Permutation, random_words
from megalite.data.streams import TokenStream

SPLITS = ("train", "valid", "test")


class WindowDataset:
    """Samples of s + 1 tokens, each a window of a stream.

    Subclasses have `window(i)`, the position in the stream at which sample i starts.

    Any number of threads may read at once.

    Args:
        stream: the tokens of the split.
        seq_length: s, tokens that the model sees; a sample has one more, for the labels.
        split: its name, for messages.
        vocab_size: when given, ids at or above it are an error.
    """

    def __init__(self, stream: TokenStream, seq_length: int, split: str, vocab_size: int | None):
        self.stream = stream
        self.seq_length = seq_length
        self.split = split
        self.vocab_size = vocab_size

    def __getitem__(self, i: int) -> np.ndarray:
        """Sample i, int64 [s + 1].

        Raises IndexError below 0, and DatasetError for an id outside the vocabulary.
        """
        if i < 0:
            raise IndexError(f"sample {i}: samples count from 0")
        start = self.window(i)
        sample = self.stream.read(start, start + self.seq_length + 1)
        if self.vocab_size is not None:
            location = f"split '{self.split}', token {start} and after"
            check_ids(sample, self.vocab_size, location)
        return sample.astype(np.int64)


class GPTDataset(WindowDataset):
    """Samples of s + 1 tokens of a stream: `dataset[i]` for any i >= 0, over any number of epochs.

    Args:
        stream, seq_length, vocab_size: see WindowDataset.
        seed, split: the order depends on these, s and the length of the stream alone.

    Raises DatasetError when the stream has fewer than s + 1 tokens. One with fewer than 2s has one
    window an epoch.
    """

    def __init__(
        self, stream: TokenStream, seq_length: int, seed: int, split: str, vocab_size=None
    ):
        check_tokens(len(stream), seq_length, split)
        super().__init__(stream, seq_length, split, vocab_size)
        self.seed = seed
        self.windows_per_epoch = max(1, (len(stream) - seq_length) // seq_length)
        """W, samples in one epoch."""
        self._offsets = min(seq_length, len(stream) - seq_length)
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    def window(self, i: int) -> int:
        """Position in the stream at which sample i starts."""
        number, index = divmod(int(i), self.windows_per_epoch)
        offset, order = self._epoch(number)
        return offset + order(index) * self.seq_length

    def _make_epoch(self, number: int) -> tuple[int, Permutation]:
        """(position in the stream of the first window, order of the windows) of an epoch."""
        words = random_words(self.seed, "gpt windows", self.split, number)
        order = Permutation(self.windows_per_epoch, words[1 : 1 + Permutation.ROUNDS])
        return words[0] % self._offsets, order


def check_tokens(tokens: int, seq_length: int, split: str) -> None:
    """Raise DatasetError when a split has too few tokens for a sample."""
    if tokens < seq_length + 1:
        raise DatasetError(
            f"split '{split}' has {tokens} tokens but needs at least seq-length + 1 = "
            f"{seq_length + 1}. Give it a larger share of --split, use more data, or a shorter "
            "--seq-length"
        )


def parse_split(text: str) -> list[Fraction]:
    """The shares in `969,30,1` for train, valid and test, as fractions of their sum; missing ones
    are 0.

    Raises DatasetError when these are not one to three numbers >= 0 with a sum above 0.
    """
    try:
        shares = list(map(Fraction, text.split(",")))
    except (ValueError, ZeroDivisionError):
        shares = []
    if not 1 <= len(shares) <= len(SPLITS) or min(shares) < 0 or sum(shares) == 0:
        raise DatasetError(
            f"--split {text}: needs one to three numbers for train, valid and test, such as "
            "969,30,1"
        )
    shares += [Fraction(0)] * (len(SPLITS) - len(shares))
    return [share / sum(shares) for share in shares]


def split_documents(text: str, documents: int) -> dict[str, tuple[int, int]]:
    """[first, last) document of each split: the running sums of the shares, rounded to the nearest
    document.

    Splits follow one another without gaps or overlap; each is within one document of its share.
    """
    bounds = [0]
    total = Fraction(0)
    for share in parse_split(text):
        total += share
        bounds.append(int(total * documents + Fraction(1, 2)))
    return dict(zip(SPLITS, pairwise(bounds), strict=True))


@dataclass(frozen=True)
class SplitData:
    """The documents of one dataset that belong to one split."""

    indexed: IndexedDataset
    split: str
    """One of SPLITS."""
    shares: str
    """Shares of the documents for the splits, as --split has them."""

    @property
    def documents(self) -> tuple[int, int]:
        """[first, last) document. Raises DatasetError when there are none."""
        number = self.indexed.num_documents
        first, last = split_documents(self.shares, number)[self.split]
        if first == last:
            raise DatasetError(
                f"split '{self.split}' is empty: --split {self.shares} gives it none of the "
                f"{number} documents of {self.indexed.prefix}. Give it a larger share, or request "
                f"no {self.split} samples"
            )
        return first, last
