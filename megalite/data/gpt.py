"""GPT samples: windows over a stream of tokens, in an order that is computed, not stored.

A stream of T tokens gives W = (T - s) // s windows an epoch. Epoch e starts at an offset in [0, s) of its own, so that
the cuts between windows move, and visits its windows in a random order of its own. Offset and order are functions of
(seed, split, epoch): no index is built or held in memory, and nothing else (iterations, batch size, layout) matters.
"""

from fractions import Fraction
from itertools import pairwise
from math import isqrt

import numpy as np

from megalite.data.indexed import DatasetError
from megalite.data.streams import GatheredStream, TokenStream
from megalite.kernels.philox import counters, key_of, philox4x32

SPLITS = ("train", "valid", "test")
MASK = 0xFFFFFFFFFFFFFFFF


class Permutation:
    """A random permutation of 0 .. n - 1 in constant memory, exact at any n up to 2^62.

    A Feistel network with its two halves in Z_rows and Z_columns, rows * columns >= n: every round adds to one half
    a keyed hash of the other, which can be undone, so the network permutes the whole rectangle. Results of n or more
    are sent through again until they fall below n (cycle walking), which leaves a permutation of 0 .. n - 1; the
    rectangle is less than rows larger than n, so this is rare.
    """

    ROUNDS = 8

    def __init__(self, n: int, round_keys: list[int]):
        if not 1 <= n <= 2**62 or len(round_keys) != self.ROUNDS:
            raise ValueError(
                f"a permutation needs 1 <= n <= 2^62 and {self.ROUNDS} keys, not {n} and {len(round_keys)}"
            )
        self.n = n
        self._rows = isqrt(n - 1) + 1
        self._columns = -(-n // self._rows)
        self._keys = round_keys

    def __call__(self, i):
        """Where i goes: an int for an int, a uint64 array for an array of integers. 0 <= i < n."""
        if np.ndim(i) == 0:
            i = self._once(int(i))
            while i >= self.n:
                i = self._once(i)
            return i
        i = self._once(np.asarray(i).astype(np.uint64))
        while (outside := i >= self.n).any():
            i[outside] = self._once(i[outside])
        return i

    def _once(self, i):
        left, right = i // self._columns, i % self._columns
        for number, key in enumerate(self._keys):
            if number % 2 == 0:
                left = (left + _mix(right ^ key)) % self._rows
            else:
                right = (right + _mix(left ^ key)) % self._columns
        return left * self._columns + right


def _mix(x):
    """A 63-bit hash, by multiplying and folding, of ints or of uint64 arrays; a half added to it stays below 2^64."""
    x = (x * 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 32)) * 0xD6E8FEB86659FD93) & MASK
    x = ((x ^ (x >> 32)) * 0xD6E8FEB86659FD93) & MASK
    return (x ^ (x >> 32)) >> 1


class WindowDataset:
    """Samples of s + 1 tokens, each a window of a stream; a subclass says where sample i starts (`window`).

    Reading has no state that threads could tear: any number may ask at once.

    Args:
        stream: the tokens of the split.
        seq_length: s, tokens the model sees; a sample has one more, for the labels.
        split_name: for messages.
        vocab_size: when given, ids at or above it are an error.
    """

    def __init__(
        self,
        stream: TokenStream | GatheredStream,
        seq_length: int,
        split_name: str,
        vocab_size: int | None,
    ):
        self.stream, self.seq_length, self.split_name, self.vocab_size = (
            stream,
            seq_length,
            split_name,
            vocab_size,
        )
        self._unsigned = np.dtype(f"u{stream.dtype.itemsize}")
        self._checks = vocab_size is not None and vocab_size <= np.iinfo(self._unsigned).max

    def window(self, i: int) -> int:
        """Position in the stream at which sample i starts."""
        raise NotImplementedError

    def __getitem__(self, i: int) -> np.ndarray:
        """Sample i, int64 [s + 1]. Raises IndexError below 0, DatasetError for an id outside the vocabulary."""
        if i < 0:
            raise IndexError(f"sample {i}: samples count from 0")
        start = self.window(i)
        sample = self.stream.read(start, start + self.seq_length + 1)
        # Seen as unsigned numbers, negative ids are the largest of all: one maximum finds both kinds.
        if self._checks and sample.view(self._unsigned).max() >= self.vocab_size:
            worst = sample.min() if sample.min() < 0 else sample.max()
            raise DatasetError(
                f"split '{self.split_name}', token {start} and after: id {worst}, but the vocabulary has "
                f"{self.vocab_size} entries. The data was made with another tokenizer, or --vocab-size is too small"
            )
        return sample.astype(np.int64)

    def fingerprint(self) -> str:
        """Tells the data that the samples come from; see IndexedDataset.fingerprint."""
        return self.stream.fingerprint()


class GPTDataset(WindowDataset):
    """Samples of s + 1 tokens from a stream: `dataset[i]` for any i >= 0, epochs roll on.

    Args:
        stream, seq_length, vocab_size: see WindowDataset.
        seed, split_name: with the stream and s, all that the order depends on.

    Raises DatasetError when the stream has fewer than s + 1 tokens. One with fewer than 2s has one window an epoch.
    """

    def __init__(
        self,
        stream: TokenStream | GatheredStream,
        seq_length: int,
        seed: int,
        split_name: str,
        vocab_size: int | None = None,
    ):
        if len(stream) < seq_length + 1:
            raise DatasetError(
                f"split '{split_name}' has {len(stream)} tokens but needs at least seq-length + 1 = {seq_length + 1}. "
                "Give it a larger share of --split, use more data, or a shorter --seq-length"
            )
        super().__init__(stream, seq_length, split_name, vocab_size)
        self.seed = seed
        self.windows_per_epoch = max(1, (len(stream) - seq_length) // seq_length)
        """W, samples in one epoch."""
        self._offsets = min(seq_length, len(stream) - seq_length)
        self._epoch: tuple[int, int, Permutation] | None = None

    def window(self, i: int) -> int:
        """Position in the stream at which sample i starts."""
        number, index = divmod(int(i), self.windows_per_epoch)
        # One reference, read once and replaced as a whole: another thread may be in another epoch.
        epoch = self._epoch
        if epoch is None or epoch[0] != number:
            self._epoch = epoch = (number, *self._order(number))
        _, offset, permutation = epoch
        return offset + permutation(index) * self.seq_length

    def _order(self, epoch: int) -> tuple[int, Permutation]:
        """Offset of the epoch's first window and the order of its windows."""
        key = key_of(self.seed, "gpt windows", self.split_name, epoch)
        numbers = [int(n) for n in philox4x32(counters(0, 5), key).reshape(-1).view("<u8")]
        return numbers[0] % self._offsets, Permutation(
            self.windows_per_epoch, numbers[1 : 1 + Permutation.ROUNDS]
        )


def parse_split(text: str) -> list[Fraction]:
    """The shares in `969,30,1` for train, valid and test, as fractions of their sum; missing ones are 0.

    Raises DatasetError when these are not one to three numbers >= 0 with a sum above 0.
    """
    try:
        shares = [Fraction(part.strip()) for part in text.split(",")]
    except (ValueError, ZeroDivisionError):
        shares = []
    if not 1 <= len(shares) <= len(SPLITS) or min(shares) < 0 or sum(shares) == 0:
        raise DatasetError(
            f"--split {text}: needs one to three numbers for train, valid and test, such as 969,30,1"
        )
    shares += [Fraction(0)] * (len(SPLITS) - len(shares))
    return [share / sum(shares) for share in shares]


def split_documents(text: str, documents: int) -> dict[str, tuple[int, int]]:
    """[first, last) document of each split: the running sums of the shares, rounded to the nearest document.

    Splits follow one another without gaps or overlap, and each is within one document of its exact share.
    """
    bounds, total = [0], Fraction(0)
    for share in parse_split(text):
        total += share
        bounds.append(int(total * documents + Fraction(1, 2)))
    return dict(zip(SPLITS, pairwise(bounds), strict=True))
