"""Checks before the first step, on real ranks: what every node must see, and slow ranks."""

import json
import re
from dataclasses import replace

from megalite.config.run import from_flat
from megalite.kernels import native
from megalite.parallel.config import ParallelConfig
from megalite.parallel.context import ParallelContext
from megalite.parallel.layout import ParallelLayout
from megalite.training.build import build_context
from megalite.training.startup import check_data, check_stragglers, compare_times, take_lease
from megalite.watch.agreement import RanksDiffer


def context_of(launch) -> ParallelContext:
    return ParallelContext.create(ParallelLayout(data=launch.world_size), launch)


def claim_on_rank(launch, folders: list[str]) -> str:
    try:
        lease = take_lease(folders[launch.rank], context_of(launch))
    except RanksDiffer as error:
        return str(error)
    return lease.token if lease else "seen"


def test_a_folder_that_only_some_nodes_share(pool, tmp_path):
    shared, own = str(tmp_path / "shared"), str(tmp_path / "own")
    first, *others = pool.run(claim_on_rank, 3, [shared] * 3)
    assert (
        others == ["seen"] * 2
        and json.loads((tmp_path / "shared/owner.json").read_text())["token"] == first
    )
    told, *others = pool.run(claim_on_rank, 3, [shared, shared, own])
    assert re.search(
        r"is not one folder .* what rank 0 wrote is missing for rank\(s\) 2 on \S+$", told
    )
    assert others == ["", ""]


def data_on_rank(launch) -> str:
    try:
        check_data({"sources": launch.rank == 1}, context_of(launch))
    except RanksDiffer as error:
        return str(error)
    return "all the same"


def test_other_data_under_the_same_path(pool):
    told, other = pool.run(data_on_rank, 2)
    assert (
        re.search(r"training data is not the same on all nodes.* rank\(s\) 1 on \S+$", told)
        and other == ""
    )


def test_slow_ranks_are_named():
    told = [
        ("a", {"product": 0.1}),
        ("a", {"product": 0.11}),
        ("b", {"product": 0.3}),
        ("b", {"product": 0.09}),
    ]
    assert compare_times(told) == [
        "product: median 100.00 ms, slowest 300.00 ms",
        "SLOW: rank 2 on b: 300.00 ms, 3.0 times the median, for product",
    ]
    assert (
        compare_times(told[:2])[1] == "no stragglers: no rank takes more than 1.5 times the median"
    )


def test_a_slow_node_of_two_is_named():
    told = [
        ("a", {"product": 0.1}),
        ("a", {"product": 0.1}),
        ("b", {"product": 0.2}),
        ("b", {"product": 0.2}),
    ]
    assert [line.partition(":")[0] for line in compare_times(told)] == ["product", "SLOW", "SLOW"]


def start_with_other_kernels(launch, config) -> str:
    before, native.MISSING = native.MISSING, f"not built on node {launch.rank}"
    try:
        build_context(config, launch)
    except RanksDiffer as error:
        return str(error)
    finally:
        native.MISSING = before
    return "started"


def test_kernels_on_some_nodes_only(pool):
    """Their sums are rounded otherwise, so ranks that should hold the same weights would not."""
    told, other = pool.run(
        start_with_other_kernels, 2, replace(from_flat({}), parallel=ParallelConfig(device="cpu"))
    )
    assert re.search(r"rank\(s\) 1 on \S+: kernels .*not built on node 1", told) and other == ""


def measured_on_rank(launch) -> str:
    said = []
    check_stragglers(context_of(launch), said.append)
    return said[0]


def test_every_rank_and_group_is_measured(pool):
    told = pool.run(measured_on_rank, 2)[0]
    assert (
        "a product of 512 x 512 matrices: median" in told
        and "4 MiB in the data group: median" in told
    )
