"""Checks before the first step, on real ranks: what every node must see."""

import json
import re
from dataclasses import replace

from megalite.config.run import from_flat
from megalite.kernels import native
from megalite.parallel.config import ParallelConfig
from megalite.parallel.context import ParallelContext
from megalite.parallel.layout import ParallelLayout
from megalite.training.build import build_context
from megalite.training.startup_checks import check_data, take_lease
from megalite.watch.agreement import RanksDiffer


def context_of(launch) -> ParallelContext:
    return ParallelContext.create(ParallelLayout(data=launch.world_size), launch)


def lease_on_rank(launch, folders: list[str]) -> str:
    try:
        lease = take_lease(folders[launch.rank], context_of(launch))
    except RanksDiffer as error:
        return str(error)
    return lease.token if lease else "seen"


def test_a_folder_that_only_some_nodes_share(pool, tmp_path):
    shared = str(tmp_path / "shared")
    own = str(tmp_path / "own")
    first, *others = pool.run(lease_on_rank, 3, [shared] * 3)
    assert (
        others == ["seen"] * 2
        and json.loads((tmp_path / "shared/owner.json").read_text())["token"] == first
    )
    said, *others = pool.run(lease_on_rank, 3, [shared, shared, own])
    assert re.search(
        r"is not one folder .* what rank 0 wrote is missing for rank\(s\) 2 on \S+$", said
    )
    assert others == ["", ""]


def data_on_rank(launch) -> str:
    try:
        check_data({"sources": launch.rank == 1}, context_of(launch))
    except RanksDiffer as error:
        return str(error)
    return "all the same"


def test_other_data_under_the_same_path(pool):
    said, other = pool.run(data_on_rank, 2)
    assert (
        re.search(r"training data is not the same on all nodes.* rank\(s\) 1 on \S+$", said)
        and other == ""
    )


def start_with_other_kernels(launch, config) -> str:
    before = native.MISSING
    native.MISSING = f"not built on node {launch.rank}"
    try:
        build_context(config, launch)
    except RanksDiffer as error:
        return str(error)
    finally:
        native.MISSING = before
    return "started"


def test_kernels_on_some_nodes_only(pool):
    """Their sums are rounded otherwise, so ranks that should hold the same weights would not."""
    said, other = pool.run(
        start_with_other_kernels, 2, replace(from_flat({}), parallel=ParallelConfig(device="cpu"))
    )
    assert re.search(r"rank\(s\) 1 on \S+: kernels .*not built on node 1", said) and other == ""
