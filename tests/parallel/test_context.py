"""The context of a rank: its groups and its device."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from megalite.parallel.collectives import all_reduce, barrier, gather_objects
from megalite.parallel.context import ParallelContext, choose_device
from megalite.parallel.launch import LaunchInfo
from megalite.parallel.layout import ParallelLayout

LAUNCH = LaunchInfo(
    rank=0, world_size=4, local_rank=3, local_world_size=4, init_method="", source="tests"
)
LAYOUT = ParallelLayout(tensor=2, pipeline=2, data=2)


def groups_of(launch):
    context = ParallelContext.create(LAYOUT, launch)
    groups = {axis: context.group(axis) for axis in LAYOUT.axes} | {"world": context.world}
    seen = {
        name: (group.ranks, group.rank, gather_objects(launch.rank, group))
        for name, group in groups.items()
    }
    total = torch.ones(1)
    if context.embedding is not None:
        all_reduce(total, context.embedding)
        seen["embedding"] = (context.embedding.ranks, context.embedding.rank, [0] * int(total))
    context.destroy()
    context.destroy()
    return context.coordinates, seen


def test_groups_are_those_of_the_layout(pool):
    """Each talks to exactly the ranks it says."""
    for rank, (coordinates, seen) in enumerate(pool.run(groups_of, 8)):
        assert coordinates == LAYOUT.coordinates(rank)
        for axis in LAYOUT.axes:
            (expected,) = (ranks for ranks in LAYOUT.groups(axis) if rank in ranks)
            assert seen[axis] == (expected, coordinates[axis], list(expected))
        assert seen["world"] == (range(8), rank, list(range(8)))
        ranks, index, members = seen["embedding"]
        assert ranks in LAYOUT.embedding_groups() and ranks[index] == rank and len(members) == 2


def test_a_single_process_needs_no_group():
    alone = replace(LAUNCH, world_size=1)
    for context in (ParallelContext.single(), ParallelContext.create(ParallelLayout(), alone)):
        assert (context.rank, context.world_size) == (0, 1)
        assert context.coordinates == {"tensor": 0, "data": 0, "pipeline": 0}
        assert context.embedding is None and context.group("data", "tensor").size == 1
        assert context.world.handle is None
        context.destroy()


def test_a_layout_of_another_size_is_refused():
    with pytest.raises(ValueError, match="has 8 ranks; the launcher started 4"):
        ParallelContext.create(LAYOUT, LAUNCH)


def test_devices():
    assert choose_device("cpu", LAUNCH) == (torch.device("cpu"), "as --device cpu says")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    crowded = replace(LAUNCH, local_world_size=gpus + 1, local_rank=gpus)
    device, why = choose_device("auto", crowded)
    assert (
        device.type == "cpu" and why == f"{gpus} GPU(s) on this node for {gpus + 1} local rank(s)"
    )
    with pytest.raises(ValueError, match=f"{gpus} GPU.* for {gpus + 1} local rank.*--device cpu"):
        choose_device("cuda", crowded)


def handles_of(launch, layout):
    """How many of torch's groups a rank has, which of the context's share one, and what is not
    there."""
    context = ParallelContext.create(layout, launch)
    groups = [context.world, *context.groups.values(), context.control]
    handles = {id(group.handle) for group in groups if group.handle is not None}
    total = torch.ones(1)
    all_reduce(total, context.group("data", "tensor" if layout.tensor == 1 else "data"))
    with pytest.raises(ValueError, match="no axis 'expert'"):
        context.group("expert")
    missing = ""
    try:
        context.group("tensor", "pipeline")
    except ValueError as error:
        missing = str(error)
    made = len(dist.distributed_c10d._world.pg_map)
    barrier(context.control)  # a rank that leaves early would break the connections of the others
    context.destroy()
    return len(groups), len(handles), int(total), missing, made


@pytest.mark.parametrize(
    ("layout", "groups", "handles", "missing"),
    [
        # Data parallelism alone: the data group is the world.
        (ParallelLayout(data=4), 3, 2, ""),
        (ParallelLayout(tensor=2, data=2), 4, 4, ""),
        (ParallelLayout(tensor=2, pipeline=2), 4, 4, "no group over tensor x pipeline was made"),
    ],
    ids=str,
)
def test_only_the_groups_that_are_needed_are_made(pool, layout, groups, handles, missing):
    """Axes of one rank have none, groups of the same ranks share one, and a rank makes its own
    only: a pipeline of two stages is its embedding group too."""
    for found in pool.run(handles_of, 4, layout):
        assert found[:3] == (groups, handles, layout.data)
        assert missing in found[3] and bool(missing) == bool(found[3])
        assert found[4] == handles
