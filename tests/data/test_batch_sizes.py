"""Sizes of global batches while they grow."""

import random

import pytest

from megalite.data.batch_sizes import BatchSizes


def test_without_a_ramp_all_batches_have_one_size():
    sizes = BatchSizes.from_words(8, None)
    assert [sizes.at(consumed) for consumed in (0, 8, 800)] == [8, 8, 8]
    assert sizes.consumed_after(100) == 800 and sizes.iterations_within(807) == 100


def test_a_ramp_grows_in_steps():
    """Three steps of 10 samples from 4 to 16: a batch has the size that its first sample gives."""
    sizes = BatchSizes.from_words(16, ("4", "4", "30"))
    consumed = [0]
    for _ in range(8):
        consumed.append(consumed[-1] + sizes.at(consumed[-1]))
    assert consumed == [0, 4, 8, 12, 20, 32, 48, 64, 80]
    assert [sizes.consumed_after(i) for i in range(9)] == consumed


def test_whole_numbers_and_their_inverse_follow_the_sizes():
    draw = random.Random(0)
    for _ in range(300):
        start, increment = draw.randint(1, 9), draw.randint(1, 6)
        final = start + increment * draw.randint(1, 6)
        words = (str(start), str(increment), str(draw.randint(1, 200)))
        sizes = BatchSizes.from_words(final, words)
        consumed = 0
        for iteration in range(60):
            assert sizes.consumed_after(iteration) == consumed
            assert sizes.iterations_within(consumed) == iteration
            consumed += sizes.at(consumed)
            assert sizes.iterations_within(consumed - 1) == iteration


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("4", "4"), "three whole numbers"),
        (("4", "0", "8"), "three whole numbers"),
        (("4", "x", "8"), "three whole numbers"),
        (("20", "4", "8"), "starts above --global-batch-size 16"),
        (("16", "4", "8"), "has no effect"),
        (("4", "5", "8"), "16 - 4 is not a multiple of 5"),
    ],
)
def test_what_is_no_ramp_is_refused(words, reason):
    with pytest.raises(ValueError, match=reason):
        BatchSizes.from_words(16, words)


def test_sizes_may_begin_after_other_batches():
    """As after a resume with other batches: from 6 samples in 3 iterations on."""
    sizes = BatchSizes.from_words(16, ("4", "4", "30"))
    since = (3, 6)
    consumed = [6]
    for _ in range(6):
        consumed.append(consumed[-1] + sizes.at(consumed[-1]))
    assert [sizes.consumed_after(3 + i, since) for i in range(7)] == consumed
    assert [sizes.iterations_within(samples, since) for samples in consumed] == [*range(3, 10)]
    assert BatchSizes(4).consumed_after(5, (3, 6)) == 14
