"""Masking: how many tokens, which ones, and what replaces them. Bounds on counts are 5
standard deviations."""

from collections import Counter
from math import sqrt

import numpy as np
import pytest

from megalite.data.bert_config import BertDataConfig
from megalite.data.indexed import DatasetError
from megalite.data.masking import Masker, SpecialIds
from megalite.kernels.philox import counters, key_of, philox4x32

SPECIAL = SpecialIds(cls=2, sep=3, mask=4, pad=0)
V = 100


def numbers(n, which):
    return philox4x32(counters(0, n), key_of(1, "test masks", which))


def masker(starts_word=None, vocab_size=V, **config):
    return Masker(SPECIAL, vocab_size, starts_word, BertDataConfig(**config))


def sentence(n):
    """n tokens of text in the frame of a pair."""
    ids = 5 + np.arange(n) % (V - 5)
    return np.concatenate(
        [[SPECIAL.cls], ids[: n // 2], [SPECIAL.sep], ids[n // 2 :], [SPECIAL.sep]]
    )


def near(count, draws, probability):
    return abs(count - draws * probability) <= 5 * sqrt(draws * probability * (1 - probability))


@pytest.mark.parametrize(
    ("n", "expected"), [(1, 1), (3, 1), (10, 2), (11, 2), (100, 15), (509, 76)]
)
def test_number_of_masked_tokens(n, expected):
    for which in range(20):
        seen, chosen = masker()(sentence(n), numbers(n + 3, which))
        assert chosen.sum() == expected and not chosen[np.isin(sentence(n), [2, 3])].any()
        assert np.array_equal(seen[~chosen], sentence(n)[~chosen]) and seen.dtype == np.int64


def test_replacements_are_80_10_10_and_random_ids_are_uniform():
    tokens = sentence(400)
    draws = 600
    kinds = Counter()
    random = Counter()
    for which in range(draws):
        seen, chosen = masker()(tokens, numbers(403, which))
        for before, after in zip(tokens[chosen].tolist(), seen[chosen].tolist(), strict=True):
            kinds["mask" if after == SPECIAL.mask else "kept" if after == before else "random"] += 1
            random[after] += after not in (SPECIAL.mask, before)
    total = 60 * draws
    ids = V - 4
    assert sum(kinds.values()) == total
    assert near(kinds["mask"], total, 0.8)
    assert near(kinds["random"], total, 0.1 * (1 - 1 / ids)), (
        "a random id is the token's own once in 96"
    )
    assert near(kinds["kept"], total, 0.1 * (1 + 1 / ids))
    assert set(random) - {2, 3, 4, 0} == {1, *range(5, V)} and not random.keys() & {2, 3, 0}
    assert all(near(random[i], kinds["random"], 1 / ids) for i in {1, *range(5, V)})


@pytest.mark.parametrize("max_ngrams", [1, 3])
def test_every_position_is_chosen_about_as_often(max_ngrams):
    """With n-grams the two first and the two last words of a segment are chosen less and more
    often: not looked at."""
    n = 80
    draws = 3000
    where = np.zeros(n + 3)
    for which in range(draws):
        where += masker(max_ngrams=max_ngrams)(sentence(n), numbers(n + 3, which))[1]
    assert where.sum() == draws * 12
    inner = where[3 : n // 2 - 1] if max_ngrams > 1 else where[1 : n // 2 + 1]
    mean = inner.mean() / draws
    assert near(mean, 1, 0.15) and all(near(count, draws, mean) for count in inner)


def pieces():
    """Which ids begin a word: every id that is no multiple of 3."""
    return np.arange(V) % 3 != 0


def words_of(tokens, starts_word):
    """Positions of each word of a sample."""
    words = []
    inside = False
    for position, token in enumerate(tokens.tolist()):
        special = token in (0, 2, 3, 4)
        if not special and (starts_word[token] or not inside):
            words.append([])
        inside = not special
        if inside:
            words[-1].append(position)
    return words


@pytest.mark.parametrize("max_ngrams", [1, 2, 3])
@pytest.mark.parametrize("n", [20, 61, 300])
def test_words_are_masked_whole_and_the_budget_holds(n, max_ngrams):
    rng = np.random.default_rng(n)
    for which in range(100):
        tokens = sentence(n)
        tokens[tokens > 4] = rng.integers(5, V, n)
        chosen = masker(pieces(), whole_word_mask=True, max_ngrams=max_ngrams)(
            tokens, numbers(n + 3, which)
        )[1]
        words = words_of(tokens, pieces())
        assert 1 <= chosen.sum() <= round(0.15 * n)
        assert chosen.sum() >= round(0.15 * n) - max(len(word) for word in words) + 1
        whole = [bool(chosen[word[0]]) for word in words]
        assert all(
            (chosen[word] == choice).all() for word, choice in zip(words, whole, strict=True)
        )


def test_a_word_longer_than_the_budget_gives_one_token():
    """Ten tokens of one word, of which two may be masked."""
    tokens = np.array([2, 5, 6, 9, 12, 15, 18, 21, 24, 27, 30, 3])
    starts = np.arange(V) == 5
    where = Counter()
    for which in range(1000):
        chosen = masker(starts, whole_word_mask=True)(tokens, numbers(12, which))[1]
        assert chosen.sum() == 1
        where[int(chosen.argmax())] += 1
    assert set(where) == set(range(1, 11)) and all(
        near(count, 1000, 0.1) for count in where.values()
    )


@pytest.mark.parametrize("pieces_per_word", [1, 2])
def test_ngrams_are_as_long_as_one_over_n_says(pieces_per_word):
    """A budget of three words of 1000: the first n-gram always fits, and hardly ever meets the next
    one."""
    words = 1000
    draws = 600
    sizes = Counter()
    tokens = np.concatenate([[2], np.tile([7, 8][:pieces_per_word], words), [3]])
    mask = masker(
        np.arange(V) == 7, whole_word_mask=pieces_per_word > 1, max_ngrams=3, mask_prob=3 / words
    )
    for which in range(draws):
        random = numbers(len(tokens), which)
        chosen = mask(tokens, random)[1][1:-1].reshape(words, -1)
        assert (chosen.all(axis=1) == chosen.any(axis=1)).all() and chosen[:, 0].sum() == 3
        first = int(random[1:-1:pieces_per_word, 0].argmin())
        sizes[int(np.append(chosen[first:, 0], False).argmin())] += 1
    assert all(
        near(sizes[size], draws, share) for size, share in {1: 6 / 11, 2: 3 / 11, 3: 2 / 11}.items()
    ), sizes


def test_ngrams_stay_within_a_segment():
    """Segments of one word: every n-gram has length 1, and the words with the smallest numbers are
    chosen."""
    tokens = np.array([2] + [5, 3] * 10)
    for which in range(50):
        random = numbers(21, which)
        chosen = masker(max_ngrams=3, mask_prob=0.5)(tokens, random)[1]
        assert sorted(np.flatnonzero(chosen)) == sorted(1 + 2 * np.argsort(random[1::2, 0])[:5])


def test_nothing_to_mask():
    seen, chosen = masker()(np.array([2, 3]), numbers(2, 0))
    assert seen.tolist() == [2, 3] and not chosen.any()


@pytest.mark.parametrize(
    "special", [SpecialIds(1, 2, 3, 3), SpecialIds(1, 2, 3, 100), SpecialIds(1, 2, 3, -1)]
)
def test_special_ids_that_do_not_fit_are_refused(special):
    with pytest.raises(DatasetError, match="in a vocabulary of 100: these ids must differ"):
        Masker(special, V, None, BertDataConfig())


def test_other_errors():
    with pytest.raises(DatasetError, match="not be all of it"):
        Masker(SpecialIds(0, 1, 2, 3), 4, None, BertDataConfig())
    with pytest.raises(
        DatasetError,
        match="each of the 100 tokens whether it starts a word, but that is known for 0",
    ):
        masker(whole_word_mask=True)
    with pytest.raises(DatasetError, match="known for 99"):
        masker(np.ones(99, bool), whole_word_mask=True)
