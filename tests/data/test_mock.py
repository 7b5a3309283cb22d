"""Mock data: repeatable, in range, and worth learning."""

import numpy as np
import pytest

from megalite.data.mock import MockDataset


@pytest.mark.parametrize("vocab_size", [2, 3, 6, 257, 50257, 2**31 - 1])
def test_shape_and_range(vocab_size):
    sample = MockDataset(vocab_size, 64, 1, "train")[5]
    assert sample.shape == (65,) and sample.dtype == np.int64
    assert sample.min() >= 0 and sample.max() < vocab_size


def test_samples_depend_on_seed_split_and_index_alone():
    one = MockDataset(1000, 32, 1, "train")
    two = MockDataset(1000, 32, 1, "train")
    backward = {i: two[i].tolist() for i in reversed(range(20))}
    assert all(one[i].tolist() == backward[i] for i in range(20))
    assert len({tuple(sample) for sample in backward.values()}) == 20
    assert MockDataset(1000, 32, 2, "train")[0].tolist() != backward[0]
    assert MockDataset(1000, 32, 1, "valid")[0].tolist() != backward[0]
    assert MockDataset(1000, 32, 1, "train")[10**15].shape == (33,)


def test_three_in_four_tokens_follow_the_rule_and_the_rest_are_spread():
    data = MockDataset(257, 256, 1, "train")
    samples = np.stack([data[i] for i in range(200)])
    follows = samples[:, 1:] == (samples[:, :-1] * data.multiplier + data.increment) % 257
    assert abs(follows.mean() - (0.75 + 0.25 / 257)) < 0.01
    counts = np.bincount(samples[:, 1:][~follows], minlength=257)
    assert counts.min() > 0 and counts.max() < 3 * counts.mean()
    assert len(np.unique((np.arange(257) * data.multiplier + data.increment) % 257)) == 257


def test_errors():
    with pytest.raises(ValueError, match="--vocab-size < 2\\^31, not 1"):
        MockDataset(1, 8, 0, "train")
    with pytest.raises(IndexError):
        MockDataset(8, 8, 0, "train")[-1]
