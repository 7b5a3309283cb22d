"""Pairs of segments: labels are right and balanced, and nothing but the text reveals them. Bounds
on counts are 5 standard deviations."""

from collections import Counter
from math import sqrt

import numpy as np
import pytest

from tests.data.bert_samples import (
    CORPORA,
    bert,
    consecutive,
    dataset_of,
    edges_of,
    near,
    starts_of,
    text,
)


def parts_of_pairs(dataset, count):
    """(segments, label) of the first samples that are pairs."""
    for i in range(count):
        sample = dataset[i]
        if sample["pair_mask"]:
            yield text(sample), int(sample["pair_label"])


@pytest.mark.parametrize("s", [24, 200])
def test_segments_are_whole_sentences_until_they_are_trimmed(tmp_path, s):
    """What is not full ends at sentence borders everywhere; what is full was trimmed by a sentence
    or two at most."""
    data = dataset_of(tmp_path / "a", CORPORA["articles"])
    starts = starts_of(data)
    edges = set(edges_of(data).tolist())
    full = 0
    for (a, b), label in parts_of_pairs(bert(data, s, short_seq_prob=0.0), 800):
        a, b = (b, a) if label else (a, b)
        if len(a) + len(b) < s - 3:  # the document has no more
            one_sentence = not starts & set(range(a[0] + 1, b[-1] + 1))
            assert (
                b[0] == a[-1] + 1
                and {a[0], b[-1] + 1} <= starts
                and (b[0] in starts or one_sentence)
            )
            assert a[0] in edges or b[-1] + 1 in edges
        else:
            full += 1
            assert 0 < b[0] - a[-1] <= 2 * max(data.lengths)
    assert full > 600 if s == 24 else full == 0


_random = np.random.default_rng(3)
LEAKS = {
    "long": [_random.integers(1, 40, 300).tolist() for _ in range(20)],
    "short": [_random.integers(1, 40, n).tolist() for n in _random.integers(2, 12, 300)],
}


def outward(parts, starts, room: int):
    """What can be seen of a pair without reading it: which of its ends are sentence borders, how
    full it is, and which of its segments is longer."""
    (a, b) = parts
    sizes = [len(part) for part in parts]
    ends = (a[0] in starts, a[-1] + 1 in starts, b[0] in starts, b[-1] + 1 in starts)
    return {
        **dict(enumerate(ends)),
        "full": sum(sizes) == room,
        "longer": int(np.sign(sizes[0] - sizes[1])),
        "all": ends,
    }


@pytest.mark.parametrize("pair", ["sop", "nsp"])
@pytest.mark.parametrize("s", [64, 256])
@pytest.mark.parametrize("kind", LEAKS)
def test_the_form_of_a_pair_does_not_reveal_its_label(tmp_path, kind, s, pair):
    """The best guess from each look, learned on one half of the samples, is right for half of the
    others. (Labels of next sentences come in pairs: twice the variance.)"""
    data = dataset_of(tmp_path / "a", LEAKS[kind])
    starts = starts_of(data)
    seen = [
        (outward(parts, starts, s - 3), label)
        for parts, label in parts_of_pairs(bert(data, s, bert_pair=pair), 4000)
    ]
    half = len(seen) // 2
    for look in seen[0][0]:
        counts = Counter((looks[look], label) for looks, label in seen[:half])
        right = sum(
            (counts[looks[look], 1] > counts[looks[look], 0]) == label
            for looks, label in seen[half:]
        )
        assert abs(right / half - 0.5) < 5 * sqrt((2 if pair == "nsp" else 1) * 0.25 / half), look


def test_the_border_is_anywhere_in_the_sample(tmp_path):
    data = dataset_of(tmp_path / "a", CORPORA["articles"])
    shares = Counter()
    for (a, b), label in parts_of_pairs(bert(data, 200, short_seq_prob=0.0), 1000):
        a, b = (b, a) if label else (a, b)
        shares[round(3 * len(a) / (len(a) + len(b)))] += 1
    assert set(shares) == {0, 1, 2, 3}


def test_half_of_the_orders_are_swapped(tmp_path):
    dataset = bert(dataset_of(tmp_path / "a", CORPORA["articles"]))
    labels = 0
    draws = 2000
    for i in range(draws):
        sample = dataset[i]
        if sample["pair_mask"] == 0:
            draws -= 1
            continue
        a, b = text(sample)
        assert (b[-1] < a[0]) if sample["pair_label"] else (a[-1] < b[0])
        labels += int(sample["pair_label"])
    assert draws > 1900 and near(labels, draws, 0.5)


def test_half_of_the_next_sentences_are_of_another_document(tmp_path):
    """Labels come in pairs, half an epoch apart, so their number has twice the variance of
    independent ones; partners of one document (every 60th) are not exchanged."""
    data = dataset_of(tmp_path / "a", [[5] * 12] * 60)
    dataset = bert(data, 63, bert_pair="nsp")
    edges = edges_of(data)
    per_epoch = dataset.samples_per_epoch
    labels = 0
    seconds = Counter()
    epochs = 20
    for i in range(epochs * per_epoch):
        sample = dataset[i]
        a, b = text(sample)
        documents = [np.searchsorted(edges, part[0], side="right") for part in (a, b)]
        assert (
            consecutive(a)
            and consecutive(b)
            and (documents[0] != documents[1]) == bool(sample["pair_label"])
        )
        assert sample["pair_label"] or a[-1] < b[0]
        labels += int(sample["pair_label"])
        seconds[int(documents[1])] += int(sample["pair_label"])
    draws = epochs * per_epoch
    assert abs(labels - draws * 0.5 * 59 / 60) <= 5 * sqrt(2 * draws * 0.5 * 0.5)
    mean = labels / 60
    assert (
        all(abs(count - mean) <= 5 * sqrt(mean) for count in seconds.values())
        and len(seconds) == 60
    )


def test_segments_too_long_together_are_trimmed_to_fit(tmp_path):
    """Both documents are cut near their middle at their one border, so an exchange makes a pair of
    9 + 9 tokens and one of 20 + 20, which must become 15 + 14."""
    data = dataset_of(tmp_path / "a", [[20, 9], [9, 20]] * 30)
    dataset = bert(data, bert_pair="nsp", short_seq_prob=0.0)
    trimmed = Counter()
    for i in range(2000):
        sample = dataset[i]
        a, b = text(sample)
        assert len(a) + len(b) <= 29 and consecutive(a) and consecutive(b)
        if sample["pair_label"] and (len(a), len(b)) == (15, 14):
            trimmed[a[0] % 29, b[0] % 29] += 1
    assert len({start for start, _ in trimmed}) == 6, (
        "A, the first 20 tokens of a document, begins at 0 to 5"
    )
    assert len({start for _, start in trimmed}) == 7, "B, the last 20 tokens, begins at 9 to 15"
