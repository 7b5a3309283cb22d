"""The arithmetic of ranks."""

import pytest

from megalite.parallel.layout import AXES, Coordinates, ParallelLayout

LAYOUTS = [ParallelLayout(t, p, d) for t in (1, 2, 3) for p in (1, 2, 4) for d in (1, 2, 5)]


def test_rank_order_is_tensor_then_data_then_pipeline():
    layout = ParallelLayout(tensor=2, pipeline=2, data=2)
    places = ["{}p{}d{}t{}".format(rank, *layout.coordinates(rank)) for rank in range(8)]
    assert places == [
        "0p0d0t0",
        "1p0d0t1",
        "2p0d1t0",
        "3p0d1t1",
        "4p1d0t0",
        "5p1d0t1",
        "6p1d1t0",
        "7p1d1t1",
    ]
    groups = {axis: [tuple(group) for group in layout.groups(axis)] for axis in AXES}
    assert groups["tensor"] == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert groups["data"] == [(0, 2), (1, 3), (4, 6), (5, 7)]
    assert groups["pipeline"] == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert str(layout) == "dp=2 x tp=2 x pp=2"


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_ranks_and_coordinates_are_one_to_one(layout):
    everyone = range(layout.world_size)
    places = [layout.coordinates(rank) for rank in everyone]
    assert len(set(places)) == layout.world_size == layout.tensor * layout.pipeline * layout.data
    assert [layout.rank_of(*place) for place in places] == list(everyone)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_groups_divide_the_world_and_differ_in_their_axis_only(layout):
    for axis in AXES:
        groups = layout.groups(axis)
        assert sorted(rank for group in groups for rank in group) == list(range(layout.world_size))
        for group in groups:
            places = [layout.coordinates(rank) for rank in group]
            assert [getattr(place, axis) for place in places] == list(range(getattr(layout, axis)))
            assert len({place._replace(**{axis: 0}) for place in places}) == 1


def test_embedding_groups_pair_first_and_last_stage():
    assert ParallelLayout(tensor=2, pipeline=3, data=1).embedding_groups() == [(0, 4), (1, 5)]
    assert ParallelLayout(tensor=2, pipeline=1, data=2).embedding_groups() == []


def test_for_world_gives_the_rest_to_data():
    assert ParallelLayout.for_world(24, tensor=2, pipeline=3) == ParallelLayout(2, 3, 4)
    with pytest.raises(ValueError, match="10 ranks cannot be divided into tensor 2 x pipeline 3"):
        ParallelLayout.for_world(10, 2, 3)
    for sizes in ((0, 1, 1), (4, 0, 1), (4, -2, -2)):
        with pytest.raises(ValueError, match="at least 1"):
            ParallelLayout.for_world(*sizes)


def test_what_is_outside_is_refused():
    layout = ParallelLayout(tensor=2, pipeline=2)
    for rank in (-1, 4):
        with pytest.raises(ValueError, match=f"rank {rank} is outside this layout of 4 ranks"):
            layout.coordinates(rank)
    for place in (Coordinates(0, 0, 2), Coordinates(2, 0, 0), Coordinates(0, -1, 0)):
        with pytest.raises(ValueError, match="outside the layout dp=1 x tp=2 x pp=2"):
            layout.rank_of(*place)
    with pytest.raises(ValueError, match="no axis 'expert'; there are pipeline, data, tensor"):
        layout.groups("expert")
    with pytest.raises(ValueError, match=r"at least 1, not \{'pipeline': 0\}"):
        ParallelLayout(pipeline=0)
