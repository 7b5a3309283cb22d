"""The samples of Megatron-core's GPTDataset (0.19), in its order, to repeat the data of its runs.

Its rules for one split, whose epoch has T tokens, with E the smallest number of epochs for which
E * T >= num_samples * s + 1:

    split      sequences of the .idx file, which it calls documents, rounded as by `split_sequences`
    sequences  repeated E times and shuffled as one list. When the run uses less than 80% of the
               last epoch's samples, that epoch is shuffled on its own, and comes last
    samples    sample k is tokens k * s .. (k + 1) * s of these sequences laid end to end; there are
               (E * T - 1) // s
    order      the samples are shuffled too. When the last epoch is on its own, those before it and
               those that reach into it are shuffled separately

One NumPy RandomState(seed), the same for every split, makes these shuffles one after another. So
the order of all samples depends on how many a run takes. Memory grows with the data: 12 bytes for
each sequence of each epoch, and 4 bytes a sample, in every process that reads data. The
counter-based order (megalite.data.gpt) has neither property.
"""

import re
from typing import NamedTuple

import numpy as np

from megalite.data.gpt import SPLITS, SplitData, WindowDataset, check_tokens, parse_split
from megalite.data.indexed import DatasetError
from megalite.data.streams import GatheredStream

SEPARATE_BELOW = 0.80
"""The last epoch is shuffled on its own when the run uses less than this share of its samples."""


class Epochs(NamedTuple):
    """What the order depends on beside the seed."""

    first: int
    last: int
    """[first, last) sequence of the split."""
    tokens: int
    """T."""
    epochs: int
    """E."""
    apart: bool
    """Whether the last epoch is shuffled on its own."""
    before_last: int
    """Samples of all epochs but the last."""


def epochs_of(data: SplitData, seq_length: int, num_samples: int) -> Epochs:
    """The epochs of a run that takes `num_samples` samples of a split.

    Raises DatasetError when the split has fewer than s + 1 tokens.
    """
    first, last = split_sequences(data.shares, len(data.indexed))[data.split]
    tokens = int(data.indexed.lengths[first:last].sum(dtype=np.int64))
    check_tokens(tokens, seq_length, data.split)
    epochs = -(-(num_samples * seq_length + 1) // tokens)
    before_last = ((epochs - 1) * tokens - 1) // seq_length
    limit = int(SEPARATE_BELOW * ((tokens - 1) // seq_length))
    apart = epochs > 1 and num_samples - before_last < limit
    return Epochs(first, last, tokens, epochs=epochs, apart=apart, before_last=before_last)


class MegatronOrderDataset(WindowDataset):
    """Samples of s + 1 tokens: `dataset[i]` for 0 <= i < len(dataset), which is at least `samples`.

    The last partial sample is dropped in every split, which is Megatron-core's default.

    Args:
        data: the split of a dataset, of whose sequences it takes its share.
        seq_length: s.
        seed: of the shuffles, the same for every split; NumPy's, so below 2^32.
        num_samples: number of samples that the run takes; the order depends on it.
        vocab_size: when given, ids at or above it are an error.

    Raises DatasetError when the split has fewer than s + 1 tokens, and for a seed or a number of
    sequences that Megatron-core does not support.
    """

    def __init__(
        self, data: SplitData, seq_length: int, *, seed: int, num_samples: int, vocab_size=None
    ):
        indexed = data.indexed
        if not 0 <= seed < 2**32 or len(indexed) >= 2**31:
            raise DatasetError(
                "--sample-order megatron: takes a --seed below 2^32 and fewer than 2^31 sequences, "
                f"not {seed} and the {len(indexed)} of {indexed.prefix}"
            )
        first, last, tokens, epochs, apart, before_last = epochs_of(data, seq_length, num_samples)
        random = np.random.RandomState(seed)
        # Repeat and shuffle the sequences; the stream lays them end to end.
        order = np.tile(np.arange(first, last, dtype=np.int32), epochs)
        _shuffle(order, (epochs - 1) * (last - first) if apart else len(order), random)
        stream = GatheredStream(indexed, order, f"sequences {first}:{last}")
        super().__init__(stream, seq_length, data.split, vocab_size)
        # Shuffle the samples.
        count = (epochs * tokens - 1) // seq_length
        self._windows = np.arange(count, dtype=np.uint32 if count < 2**32 - 2 else np.int64)
        _shuffle(self._windows, before_last if apart else count, random)

    def __len__(self) -> int:
        return len(self._windows)

    def window(self, i: int) -> int:
        """Position in the shuffled sequences at which sample i starts.

        Raises IndexError outside of 0 .. len - 1.
        """
        if not 0 <= i < len(self):
            raise IndexError(
                f"sample {i}: split '{self.split}' has {len(self)} in the order of megatron"
            )
        return int(self._windows[i]) * self.seq_length


def _shuffle(values: np.ndarray, border: int, random: np.random.RandomState) -> None:
    """Shuffle values[:border] in place, then values[border:]."""
    random.shuffle(values[:border])
    random.shuffle(values[border:])


def split_sequences(text: str, sequences: int) -> dict[str, tuple[int, int]]:
    """[first, last) sequence of each split, rounded as Megatron-core does: running float64 sums of
    the normalised shares, times the number of sequences, to the nearest integer, halves to even.

    Raises DatasetError for an invalid split, and for one that Megatron-core would read as other
    numbers, such as 1e3 or 1/2.
    """
    parse_split(text)
    if not re.fullmatch(r"\s*[.0-9]+\s*(,\s*[.0-9]+\s*)*", text):
        raise DatasetError(
            f"--split {text}: --sample-order megatron takes plain numbers, such as 969,30,1 or "
            "0.98,0.02"
        )
    # Every rounding to float64 is part of the rule: no sum(), which newer Pythons make more exact.
    shares = list(map(float, text.split(",")))
    shares += [0.0] * (len(SPLITS) - len(shares))
    whole = shares[0] + shares[1] + shares[2]
    bounds = {}
    total = 0.0
    first = 0
    for name, share in zip(SPLITS, shares, strict=True):
        total += share / whole
        last = round(total * float(sequences))
        bounds[name] = (first, last)
        first = last
    return bounds
