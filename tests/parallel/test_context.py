"""The context of a rank: its groups and its device."""

from dataclasses import replace

import pytest
import torch

from megalite.parallel.collectives import all_reduce, gather_objects
from megalite.parallel.context import ParallelContext, choose_device
from megalite.parallel.launch import LaunchInfo
from megalite.parallel.layout import AXES, Coordinates, ParallelLayout

LAUNCH = LaunchInfo(
    rank=0, world_size=4, local_rank=3, local_world_size=4, init_method="", source="tests"
)
LAYOUT = ParallelLayout(tensor=2, pipeline=2, data=2)


def groups_of(launch):
    context = ParallelContext.create(LAYOUT, launch)
    groups = {axis: getattr(context, axis) for axis in (*AXES, "world")}
    seen = {
        name: (group.ranks, group.rank, gather_objects(launch.rank, group))
        for name, group in groups.items()
    }
    total = torch.ones(1)
    if context.embedding is not None:
        all_reduce(total, context.embedding)
        seen["embedding"] = (context.embedding.ranks, context.embedding.rank, [0] * int(total))
    stage = (context.is_first_stage, context.is_last_stage)
    context.destroy()
    context.destroy()
    return context.coordinates, stage, seen


def test_groups_are_those_of_the_layout(pool):
    """Each talks to exactly the ranks it says."""
    for rank, (coordinates, stage, seen) in enumerate(pool.run(groups_of, 8)):
        assert coordinates == LAYOUT.coordinates(rank)
        assert stage == (coordinates.pipeline == 0, coordinates.pipeline == 1)
        for axis in AXES:
            (expected,) = (ranks for ranks in LAYOUT.groups(axis) if rank in ranks)
            assert seen[axis] == (expected, getattr(coordinates, axis), list(expected))
        assert seen["world"] == (range(8), rank, list(range(8)))
        ranks, index, members = seen["embedding"]
        assert ranks in LAYOUT.embedding_groups() and ranks[index] == rank and len(members) == 2


def test_a_single_process_needs_no_group():
    alone = replace(LAUNCH, world_size=1)
    for context in (ParallelContext.single(), ParallelContext.create(ParallelLayout(), alone)):
        assert (context.rank, context.world_size, context.coordinates) == (
            0,
            1,
            Coordinates(0, 0, 0),
        )
        assert context.is_first_stage and context.is_last_stage and context.embedding is None
        assert context.world.handle is None
        context.destroy()


def test_a_layout_of_another_size_is_refused():
    with pytest.raises(ValueError, match="has 8 ranks; the launcher started 4"):
        ParallelContext.create(LAYOUT, LAUNCH)


def test_devices():
    assert choose_device("cpu", LAUNCH) == (torch.device("cpu"), "asked for with --device cpu")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    crowded = replace(LAUNCH, local_world_size=gpus + 1, local_rank=gpus)
    device, why = choose_device("auto", crowded)
    assert (
        device.type == "cpu" and why == f"{gpus} GPU(s) on this node for {gpus + 1} local rank(s)"
    )
    with pytest.raises(ValueError, match=f"{gpus} GPU.* for {gpus + 1} local rank.*--device cpu"):
        choose_device("cuda", crowded)
