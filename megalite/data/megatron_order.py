"""The samples of Megatron-core's GPTDataset (0.19), in its order: for runs that must see what another run saw.

What it does: sequences of the .idx file (which it calls documents) are repeated for as many epochs as the samples need,
shuffled over all epochs, and cut into windows that advance by s tokens; the windows are shuffled too. The last epoch is
shuffled on its own when the run uses less than 80% of it. All randomness is that of NumPy's RandomState(seed).

So the order depends on the number of samples, and its index arrays grow with the data: 12 bytes a sequence and epoch,
and 4 bytes a sample, in every process that reads data. The counted order (megalite.data.gpt) has neither.
"""

from fractions import Fraction

import numpy as np

from megalite.data.gpt import SPLITS, parse_split, worst_id
from megalite.data.indexed import DatasetError, IndexedDataset

SEPARATE_BELOW = 0.80
"""The last epoch is shuffled on its own when the run uses less than this share of its samples."""


class MegatronOrderDataset:
    """Samples of s + 1 tokens: `dataset[i]` for 0 <= i < len(dataset), which is at least `samples`.

    Args:
        indexed: the dataset.
        split: shares for train, valid and test, such as 969,30,1, of its sequences.
        split_name: "train", "valid" or "test".
        seq_length: s.
        seed: of the shuffles, the same for every split.
        samples: number of samples that the run asks for; the order depends on it.
        vocab_size: when given, ids at or above it are an error.

    Raises DatasetError when the split has fewer than s + 1 tokens, or the seed is none of NumPy's.
    """

    def __init__(
        self, indexed: IndexedDataset, split: str, split_name: str, seq_length: int, seed: int, samples: int,
        vocab_size: int | None = None,
    ):  # fmt: skip
        self.indexed, self.seq_length, self.vocab_size, self.split_name = indexed, seq_length, vocab_size, split_name
        if not 0 <= seed < 2**32:
            raise DatasetError(
                f"--sample-order megatron needs a --seed below 2^32, as NumPy's RandomState does, not {seed}"
            )
        self._first, self._last = split_sequences(split, len(indexed))[split_name]
        lengths = np.asarray(indexed.lengths[self._first : self._last])
        per_epoch = int(lengths.sum(dtype=np.int64))
        if per_epoch < seq_length + 1:
            raise DatasetError(
                f"split '{split_name}' has {per_epoch} tokens but needs at least seq-length + 1 = {seq_length + 1}. "
                "Give it a larger share of --split, use more data, or a shorter --seq-length"
            )
        epochs = -(-(samples * seq_length + 1) // per_epoch)
        before_last = ((epochs - 1) * per_epoch - 1) // seq_length  # windows of all epochs but the last
        apart = epochs > 1 and samples - before_last < int(SEPARATE_BELOW * ((per_epoch - 1) // seq_length))
        random = np.random.RandomState(seed)
        self._sequences = _shuffled_sequences(len(lengths), epochs, apart, random)
        """Number of each sequence in its place, from the first of the split."""
        self._starts = np.zeros(len(self._sequences) + 1, np.int64)
        np.cumsum(lengths[self._sequences], out=self._starts[1:])
        windows = (epochs * per_epoch - 1) // seq_length
        self._windows = _shuffled_windows(windows, before_last if apart else windows, random)

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, i: int) -> np.ndarray:
        """Sample i, int64 [s + 1]. Raises IndexError outside of 0 .. len - 1, DatasetError for an id too large."""
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i}: split '{self.split_name}' has {len(self)} in the order of megatron")
        start = int(self._windows[i]) * self.seq_length
        stop = start + self.seq_length + 1
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        last = int(np.searchsorted(self._starts, stop, side="left"))
        places = range(first, last)
        parts = [self.indexed.sequence(self._first + int(self._sequences[place])) for place in places]
        origin = int(self._starts[first])
        sample = np.concatenate(parts)[start - origin : stop - origin].astype(np.int64)
        if self.vocab_size is not None and not 0 <= (worst := worst_id(sample)) < self.vocab_size:
            raise DatasetError(
                f"split '{self.split_name}', sample {i}: id {worst}, but the vocabulary has {self.vocab_size} entries. "
                "The data was made with another tokenizer, or --vocab-size is too small"
            )
        return sample

    def fingerprint(self) -> str:
        """Tells the data that the samples come from; see IndexedDataset.fingerprint."""
        return f"{self.indexed.fingerprint()}[sequences {self._first}:{self._last}]"


def split_sequences(text: str, sequences: int) -> dict[str, tuple[int, int]]:
    """[first, last) sequence of each split, with the rounding of Megatron-core: running float64 sums of the normalised
    shares, times the number of sequences, to the nearest whole number, halves to even."""
    parse_split(text)  # raises for what is no split
    given = [float(Fraction(part.strip())) for part in text.split(",")]
    shares = np.array(given + [0.0] * (len(SPLITS) - len(given)))
    bounds, total = [0.0], 0.0
    for share in shares / shares.sum():
        total += float(share)
        bounds.append(total)
    edges = [round(bound * float(sequences)) for bound in bounds]
    return {name: (edges[i], edges[i + 1]) for i, name in enumerate(SPLITS)}


def _shuffled_sequences(count: int, epochs: int, apart: bool, random: np.random.RandomState) -> np.ndarray:
    """int32 [epochs * count]: numbers of sequences, shuffled over all epochs; the last one on its own if `apart`."""
    together = np.tile(np.arange(count, dtype=np.int32), epochs - apart)
    random.shuffle(together)
    if not apart:
        return together
    last = np.arange(count, dtype=np.int32)
    random.shuffle(last)
    return np.concatenate([together, last])


def _shuffled_windows(count: int, together: int, random: np.random.RandomState) -> np.ndarray:
    """Numbers of windows [count]: the first `together` shuffled among themselves, then the others."""
    dtype = np.uint32 if count < np.iinfo(np.uint32).max - 1 else np.int64
    first, rest = np.arange(together, dtype=dtype), np.arange(together, count, dtype=dtype)
    random.shuffle(first)
    if len(rest):
        random.shuffle(rest)
    return np.concatenate([first, rest])
