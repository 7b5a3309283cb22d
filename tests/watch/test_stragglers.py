"""Slow ranks, from the times that each rank needs for the same work."""

from megalite.parallel.context import ParallelContext
from megalite.parallel.layout import ParallelLayout
from megalite.watch.stragglers import check_stragglers, compare_times


def test_slow_ranks_are_named():
    reports = [
        ("a", {"product": 0.1}),
        ("a", {"product": 0.11}),
        ("b", {"product": 0.3}),
        ("b", {"product": 0.09}),
    ]
    assert compare_times(reports) == [
        "product: median 100.00 ms, slowest 300.00 ms",
        "SLOW: rank 2 on b: 300.00 ms, 3.0 times the median, for product",
    ]
    assert (
        compare_times(reports[:2])[1]
        == "no stragglers: no rank takes more than 1.5 times the median"
    )


def test_a_slow_node_of_two_is_named():
    reports = [
        ("a", {"product": 0.1}),
        ("a", {"product": 0.1}),
        ("b", {"product": 0.2}),
        ("b", {"product": 0.2}),
    ]
    product, *slow = compare_times(reports)
    assert product.startswith("product: ") and len(slow) == 2
    assert all(line.startswith("SLOW: ") for line in slow)


def measured_on_rank(launch) -> str:
    said = []
    context = ParallelContext.create(ParallelLayout(data=launch.world_size), launch)
    check_stragglers(context, said.append)
    return said[0]


def test_every_rank_and_group_is_measured(pool):
    said = pool.run(measured_on_rank, 2)[0]
    assert "a product of 512 x 512 matrices: median" in said
    assert "4 MiB in the data group: median" in said
