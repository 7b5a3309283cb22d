"""Layers into stages, against every possible division."""

from itertools import combinations, pairwise

import pytest

from megalite.pipeline.partition import partition


def sizes(*args, **costs) -> list[int]:
    return [len(layers) for layers in partition(*args, **costs)]


def largest_load(counts, first_cost: float, last_cost: float) -> float:
    load = [float(count) for count in counts]
    load[0] += first_cost
    load[-1] += last_cost
    return max(load)


def best_load(num_layers: int, stages: int, first_cost: float, last_cost: float) -> float:
    """The smallest largest load of all divisions into consecutive, non-empty parts."""
    loads = []
    for cuts in combinations(range(1, num_layers), stages - 1):
        borders = [0, *cuts, num_layers]
        loads.append(largest_load([b - a for a, b in pairwise(borders)], first_cost, last_cost))
    return min(loads)


def test_layers_are_consecutive_and_all_there():
    assert partition(10, 3) == [range(0, 4), range(4, 7), range(7, 10)]
    for num_layers in range(1, 12):
        for stages in range(1, num_layers + 1):
            parts = partition(num_layers, stages, last_cost=1.7)
            assert [layer for part in parts for layer in part] == list(range(num_layers))
            assert all(len(part) for part in parts) and len(parts) == stages


def test_what_divides_evenly_stays_even():
    assert sizes(12, 4, first_cost=3, last_cost=5) == [3, 3, 3, 3]
    assert sizes(4, 4, last_cost=9) == [1, 1, 1, 1] and sizes(7, 1, last_cost=9) == [7]


@pytest.mark.parametrize(
    ("num_layers", "stages", "first", "last", "counts"),
    [
        (4, 3, 0, 0, [2, 1, 1]),
        (5, 2, 0, 0.5, [3, 2]),
        (5, 2, 2, 0, [2, 3]),
        (11, 4, 0, 2.5, [4, 3, 3, 1]),
        (10, 4, 1, 1, [2, 3, 3, 2]),
        (7, 3, 0, 100, [3, 3, 1]),
    ],
)
def test_uneven_shares_count_embedding_and_output(num_layers, stages, first, last, counts):
    assert sizes(num_layers, stages, first_cost=first, last_cost=last) == counts


def test_uneven_shares_are_the_best_there_are():
    for num_layers in range(2, 11):
        for stages in (p for p in range(2, num_layers) if num_layers % p):
            for first, last in ((0, 0), (0, 0.4), (0.3, 2.6), (4, 1), (0, 20)):
                counts = sizes(num_layers, stages, first_cost=first, last_cost=last)
                assert largest_load(counts, first, last) == best_load(
                    num_layers, stages, first, last
                )


@pytest.mark.parametrize("stages", [0, -1, 5])
def test_impossible_divisions(stages):
    with pytest.raises(ValueError, match=f"cannot divide 4 layers into {stages} stages"):
        partition(4, stages)
