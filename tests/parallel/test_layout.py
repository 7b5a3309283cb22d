"""The arithmetic of ranks."""

from dataclasses import dataclass
from typing import ClassVar

import pytest

from megalite.parallel.layout import ParallelLayout

SIZES = [
    (tensor, pipeline, data) for tensor in (1, 2, 3) for pipeline in (1, 2, 4) for data in (1, 2, 5)
]
LAYOUTS = [
    ParallelLayout(tensor=tensor, pipeline=pipeline, data=data) for tensor, pipeline, data in SIZES
]


@dataclass(frozen=True, kw_only=True)
class WithContext(ParallelLayout):
    """A layout with one axis more, as context parallelism will add it."""

    axes: ClassVar[tuple[str, ...]] = ("tensor", "context", "data", "pipeline")
    context: int = 1


def test_rank_order_is_tensor_then_data_then_pipeline():
    layout = ParallelLayout(tensor=2, pipeline=2, data=2)
    positions = [
        "p{pipeline}d{data}t{tensor}".format(**layout.coordinates(rank)) for rank in range(8)
    ]
    assert positions == [
        "p0d0t0", "p0d0t1", "p0d1t0", "p0d1t1", "p1d0t0", "p1d0t1", "p1d1t0", "p1d1t1",
    ]  # fmt: skip
    groups = {axis: [tuple(group) for group in layout.groups(axis)] for axis in layout.axes}
    assert groups["tensor"] == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert groups["data"] == [(0, 2), (1, 3), (4, 6), (5, 7)]
    assert groups["pipeline"] == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert str(layout) == "dp=2 x tp=2 x pp=2"


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_ranks_and_coordinates_are_one_to_one(layout):
    everyone = range(layout.world_size)
    positions = [layout.coordinates(rank) for rank in everyone]
    assert len({tuple(position.values()) for position in positions}) == layout.world_size
    assert layout.world_size == layout.tensor * layout.pipeline * layout.data
    assert [layout.rank_of(**position) for position in positions] == list(everyone)


def check_groups(layout: ParallelLayout, axes: tuple[str, ...]) -> None:
    """Groups along these axes divide the world; their ranks ascend and agree along all other
    axes."""
    groups = layout.groups(*axes)
    assert sorted(rank for group in groups for rank in group) == list(range(layout.world_size))
    others = [axis for axis in layout.axes if axis not in axes]
    for group in groups:
        assert list(group) == sorted(group)
        positions = [layout.coordinates(rank) for rank in group]
        assert len({tuple(position[axis] for axis in others) for position in positions}) == 1
        for rank in group:
            assert layout.group_of(rank, *axes) == group


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_groups_divide_the_world_and_differ_in_their_axes_only(layout):
    for axes in (
        *((axis,) for axis in layout.axes),
        ("tensor", "data"),
        ("pipeline", "tensor"),
        layout.axes,
        (),
    ):
        check_groups(layout, axes)


@pytest.mark.parametrize("sizes", [(2, 3, 2, 2), (1, 4, 3, 1), (2, 1, 2, 2)], ids=str)
def test_another_axis_enters_by_its_name(sizes):
    """Strides, coordinates and groups of any axes follow from the tuple of names."""
    layout = WithContext(**dict(zip(WithContext.axes, sizes, strict=True)))
    tensor, context, data, _ = sizes
    assert layout.strides == {
        "tensor": 1,
        "context": tensor,
        "data": tensor * context,
        "pipeline": tensor * context * data,
    }
    for rank in range(layout.world_size):
        assert layout.rank_of(**layout.coordinates(rank)) == rank
    for axes in (
        ("context",),
        ("data", "context"),
        ("tensor", "pipeline"),
        ("context", "pipeline", "tensor"),
    ):
        check_groups(layout, axes)
    # Data and context are neighbours in the order of ranks: their common group is one range.
    assert isinstance(layout.group_of(0, "context", "data"), range)
    # An axis of one rank adds nothing to a group.
    if context == 1:
        assert layout.canonical(("context", "data")) == layout.canonical(("data",))


def test_a_world_leaves_its_rest_to_data_with_another_axis_too():
    layout = WithContext.for_world(48, tensor=2, context=3, pipeline=2)
    assert (layout.data, layout.world_size) == (4, 48)


def test_groups_that_are_evenly_spaced_are_ranges():
    """So that the description of a group is short at any size."""
    layout = ParallelLayout(tensor=8, data=64, pipeline=16)
    for axes in (("tensor",), ("data",), ("pipeline",), ("tensor", "data"), layout.axes):
        assert isinstance(layout.group_of(4321, *axes), range)
    assert layout.group_of(1, "tensor", "pipeline") == tuple(
        stage * 512 + tensor for stage in range(16) for tensor in range(8)
    )


def test_embedding_groups_pair_first_and_last_stage():
    layout = ParallelLayout(tensor=2, pipeline=3, data=1)
    assert layout.embedding_groups() == [(0, 4), (1, 5)]
    assert [layout.embedding_group(rank) for rank in range(4)] == [(0, 4), (1, 5), None, None]
    assert ParallelLayout(tensor=2, pipeline=1, data=2).embedding_groups() == []


def test_for_world_gives_the_rest_to_data():
    expected = ParallelLayout(tensor=2, pipeline=3, data=4)
    assert ParallelLayout.for_world(24, tensor=2, pipeline=3) == expected
    with pytest.raises(ValueError, match="10 ranks cannot be divided into tensor 2 x pipeline 3"):
        ParallelLayout.for_world(10, tensor=2, pipeline=3)
    for world_size, tensor, pipeline in ((0, 1, 1), (4, 0, 1), (4, -2, -2)):
        with pytest.raises(ValueError, match="at least 1"):
            ParallelLayout.for_world(world_size, tensor=tensor, pipeline=pipeline)


def test_what_is_outside_is_refused():
    layout = ParallelLayout(tensor=2, pipeline=2)
    for rank in (-1, 4):
        with pytest.raises(ValueError, match=f"rank {rank} is outside this layout of 4 ranks"):
            layout.coordinates(rank)
    for position in ({"tensor": 2}, {"pipeline": 2}, {"data": -1}):
        with pytest.raises(ValueError, match="outside the layout dp=1 x tp=2 x pp=2"):
            layout.rank_of(**position)
    for ask in (layout.groups, layout.canonical, lambda axis: layout.rank_of(**{axis[0]: 0})):
        with pytest.raises(ValueError, match="no axis 'expert'; there are tensor, data, pipeline"):
            ask("expert") if ask == layout.groups else ask(("expert",))
    with pytest.raises(ValueError, match=r"at least 1, not \{'pipeline': 0\}"):
        ParallelLayout(pipeline=0)
