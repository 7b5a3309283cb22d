"""The sources of a blend, and how far each source was used when the blend changes."""

import pytest

from megalite.data.indexed import DatasetError
from megalite.data.sources import DataState, Source, UsedSource, parse_sources

ORDER = {"seed": 1, "seq_length": 8, "sample_order": "counted"}


def state(*sources: tuple[str, float], order=ORDER) -> DataState:
    """Sources by name and weight; the fingerprint is the name."""
    return DataState(
        order, tuple(UsedSource(f"/data/{name}", weight, name, 0) for name, weight in sources)
    )


def test_sources_are_weights_and_prefixes():
    assert parse_sources(["a b"]) == (Source(1.0, "a b"),)
    assert parse_sources(["0.3", "a", "7", "b"]) == (Source(0.3, "a"), Source(7.0, "b"))


@pytest.mark.parametrize(
    "words, said",
    [
        (["a", "b"], "'a' is not a weight"),
        (["0", "a", "1", "b"], "'0' is not a weight"),
        (["nan", "a"], "'nan' is not a weight"),
        (["inf", "a"], "'inf' is not a weight"),
        (["0.3", "a", "0.7"], "'0.7' has no prefix"),
        (["1", "a", "2", "a"], "a given twice"),
        ([".5", "a", ".5", "./a"], "./a given twice"),
    ],
)
def test_other_patterns_are_refused(words, said):
    with pytest.raises(DatasetError, match=f"--data-path.*{said}"):
        parse_sources(words)


def test_same_data_elsewhere_is_no_difference():
    before = state(("a", 1), ("b", 2))
    moved = DataState(
        ORDER,
        tuple(UsedSource("/new" + s.prefix, s.weight, s.fingerprint, 0) for s in before.sources),
    )
    assert before.differences(moved) == []
    assert [s.prefix for s in before.with_prefixes_of(moved).sources] == [
        "/new/data/a",
        "/new/data/b",
    ]


def test_every_difference_is_reported():
    found = state(("a", 1), ("b", 2)).differences(
        state(("a", 3), ("c", 2), order={**ORDER, "seed": 2})
    )
    assert found == [
        "seed 1 -> 2",
        "weight of /data/a 1 -> 3",
        "/data/c is new, or has other contents",
        "/data/b is no longer used",
    ]
    assert state(("a", 1), ("b", 1)).differences(state(("b", 1), ("a", 1))) == [
        "the sources are named in another order"
    ]


def test_sources_continue_after_their_last_samples():
    first = state(("a", 3), ("b", 1))
    assert first.consumed_at(0) == [0, 0] and first.consumed_at(400) == [300, 100]
    second = first.followed_by(state(("b", 1), ("c", 1)), 400)
    assert [s.consumed for s in second.sources] == [100, 0] and second.start == 400
    assert second.consumed_at(410) == [105, 5]
    third = second.followed_by(state(("a", 1)), 410)  # a was left out, and is back
    assert third.sources[0].consumed == 300 and third.consumed_at(420) == [310]
    assert DataState.from_json(third.to_json()) == third
    assert [(past["start"], [s["consumed"] for s in past["sources"]]) for past in third.before] == [
        (0, [300, 100]),
        (400, [105, 5]),
    ]


def taken(documents: str) -> DataState:
    """A source of which these documents are taken."""
    return DataState(ORDER, (UsedSource("/data/a", 1, f"2:abc[{documents}]", 0),))


def test_other_documents_of_a_source_are_no_new_source():
    assert taken("0:19").differences(taken("0:18")) == [
        "documents of /data/a [0:19] -> [0:18] (--split)"
    ]


def test_a_source_that_was_left_out_is_back():
    second = state(("a", 1), ("b", 1)).followed_by(state(("b", 1)), 10)
    assert second.differences(state(("a", 1))) == ["/data/a is back", "/data/b is no longer used"]


def test_only_ratios_of_weights_matter():
    assert state(("a", 3), ("b", 1)).differences(state(("a", 0.75), ("b", 0.25))) == []
    assert state(("a", 3), ("b", 1)).differences(state(("a", 3), ("b", 2))) == [
        "weight of /data/b 1 -> 2"
    ]
