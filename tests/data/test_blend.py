"""A blend is a sequence of which any sample can be computed: no walk, no table, the same
everywhere."""

import random
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from megalite.data.blend import MOST, Blend, BlendedDataset

WEIGHTS = [
    [1],
    [0.3, 0.7],
    [1, 1, 1],
    [1e-6, 1],
    [5, 3, 2, 1e-3],
    [1 / (j + 1) for j in range(100)],
]


def walked(weights, n: int) -> list[int]:
    """The sources of the first n samples, by the rule in exact arithmetic, one after the other."""
    total = sum(map(Fraction, weights))
    counts = [0] * len(weights)
    sources = []
    for _ in range(n):
        source = max(
            range(len(weights)),
            key=lambda j: (Fraction(weights[j]) / total / (2 * counts[j] + 1), -j),
        )
        counts[source] += 1
        sources.append(source)
    return sources


@pytest.mark.parametrize("weights", [[1], [1, 1, 1], [0.25, 0.75], [5, 3, 2]])
def test_it_is_websters_method(weights):
    blend = Blend(weights)
    assert [blend[i][0] for i in range(200)] == walked(weights, 200)


@pytest.mark.parametrize("weights", WEIGHTS, ids=lambda w: f"{len(w)} sources, {w[0]:g}")
def test_any_sample_can_be_computed_directly(weights):
    forward = Blend(weights)
    seen = Counter()
    order = [forward[i] for i in range(600)]
    for source, number in order:
        assert number == seen[source]  # the samples of a source come in order, none left out
        seen[source] += 1
    places = list(range(600))
    random.Random(1).shuffle(places)
    assert [Blend(weights)[i] for i in places[:50]] == [order[i] for i in places[:50]]
    jumping = Blend(weights)
    assert [jumping[i] for i in places] == [order[i] for i in places]


@pytest.mark.parametrize("weights", WEIGHTS, ids=lambda w: f"{len(w)} sources, {w[0]:g}")
@pytest.mark.parametrize("n", [1000, 123_456_789, 2**40 + 17, MOST - 50])
def test_far_out_too(weights, n):
    shares = [Fraction(w) / sum(map(Fraction, weights)) for w in weights]
    walking = Blend(weights)
    before = walking.counts(n)
    assert before.sum() == n
    for i in range(n, n + 40):
        assert (Blend(weights).counts(i) == before).all()
        # Half of k and one for the method; float64 shares are off by 2^-53 of n, which is less than
        # one.
        assert all(
            abs(int(c) - share * i) <= Fraction(len(weights), 2) + 2
            for c, share in zip(before, shares)
        )
        after = walking.counts(i + 1)
        assert sorted(np.unique(after - before).tolist()) == ([0, 1] if len(weights) > 1 else [1])
        assert (after - before).sum() == 1 and walking[i][0] == int((after - before).argmax())
        before = after


class Numbers:
    """Sample i is (name, i)."""

    def __init__(self, name: str):
        self.name = name

    def __getitem__(self, i: int):
        return self.name, i


def test_sources_are_used_in_order_from_where_they_were():
    first = BlendedDataset([Numbers("a"), Numbers("b")], [3, 1])
    used = [first[i] for i in range(100)]
    second = BlendedDataset([Numbers("a"), Numbers("b")], [1, 9], 100, [75, 25])
    used += [second[i] for i in range(100, 200)]
    assert len(set(used)) == 200
    for name, count in Counter(name for name, _ in used).items():
        assert sorted(i for n, i in used if n == name) == list(range(count))
    assert Counter(name for name, _ in used[100:])["b"] == 90
    assert Counter(name for name, _ in used) == {"a": 85, "b": 115}


def test_what_makes_no_sense_is_refused():
    for weights in ([], [0.0], [1, -1], [float("nan")], [float("inf"), 1]):
        with pytest.raises(ValueError, match="weights above 0"):
            Blend(weights)
    with pytest.raises(ValueError, match="needs 0 to"):
        Blend([1, 2]).counts(MOST + 1)
    with pytest.raises(IndexError, match="begins at sample 5"):
        BlendedDataset([Numbers("a")], [1], 5)[4]
    with pytest.raises(ValueError, match="2 weights"):
        BlendedDataset([Numbers("a")], [1, 2])
