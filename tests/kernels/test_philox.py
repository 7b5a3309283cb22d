"""Philox: the published answers, and the promises on counters and keys."""

import numpy as np
import pytest

from megalite.kernels.philox import BLOCK, counters, key_of, philox4x32


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        (
            "00000000 00000000 00000000 00000000",
            "00000000 00000000",
            "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
        ),
        (
            "ffffffff ffffffff ffffffff ffffffff",
            "ffffffff ffffffff",
            "408f276d 41c83b0e a20bc7c6 6d5451fd",
        ),
        (
            "243f6a88 85a308d3 13198a2e 03707344",
            "a4093822 299f31d0",
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_known_answers_of_random123(counter, key, answer):
    counter, key, answer = (
        np.array([int(word, 16) for word in text.split()], np.uint32)
        for text in (counter, key, answer)
    )
    np.testing.assert_array_equal(philox4x32(counter, key), answer)


def test_a_number_does_not_depend_on_what_else_is_drawn():
    key = key_of(7, "weights")
    count = 2 * BLOCK + 5
    together = philox4x32(counters(3, count), key)
    for start, size in ((0, 1), (BLOCK - 1, 2), (2 * BLOCK, 5)):
        np.testing.assert_array_equal(
            philox4x32(counters(3 + start, size), key), together[start : start + size]
        )
    np.testing.assert_array_equal(
        philox4x32(counters(3, count).reshape(1, count, 4), key), together[None]
    )


def test_counters_carry_into_the_second_word_and_stop_at_the_end():
    assert counters(2**32 - 1, 2).tolist() == [[2**32 - 1, 0, 0, 0], [0, 1, 0, 0]]
    assert counters(2**64 - 1, 1).tolist() == [[2**32 - 1, 2**32 - 1, 0, 0]]
    assert counters(5, 0).shape == (0, 4) and philox4x32(counters(5, 0), (1, 2)).shape == (0, 4)
    for start, count in ((2**64 - 1, 2), (-1, 1)):
        with pytest.raises(ValueError, match=r"2\^64"):
            counters(start, count)


def test_keys_are_stable_and_distinct():
    assert key_of(1234, "weights", 17) == (
        1928042041,
        3105295,
    )  # blake2b of b"i4:1234s7:weightsi2:17"
    keys = [
        key_of(1, "ab"),
        key_of(1, "a", "b"),
        key_of(1, "a", "b", ""),
        key_of(1, "1"),
        key_of(1, 1),
        key_of(11),
        key_of(-1),
    ]
    assert len(set(keys)) == len(keys)
    assert key_of(np.int64(1), np.int32(1)) == key_of(1, 1)


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(3,\)"):
        philox4x32(np.zeros(3, np.uint32), (0, 0))
    with pytest.raises(ValueError, match="key of 2 words"):
        philox4x32(np.zeros(4, np.uint32), (0, 0, 0))


def test_bits_are_balanced():
    words = philox4x32(counters(0, 50_000), key_of(0, "balance"))
    share = np.unpackbits(words.view(np.uint8)).mean()
    assert abs(share - 0.5) < 5 * 0.5 / (words.size * 32) ** 0.5
