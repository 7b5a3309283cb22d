"""Schedules as data: golden orders, and how many microbatches each rank holds."""

import pytest

from megalite.parallel.config import ParallelConfig
from megalite.pipeline.schedules import (
    SCHEDULES,
    Action,
    Orders,
    Pipeline,
    forward_only,
    gpipe,
    interleaved,
    one_forward_one_backward,
    peak_in_flight,
    pipeline_of,
    training_orders,
    zb_h1,
    zb_v,
)

LOOP = Pipeline(ranks=2, chunks=2)
V_SHAPE = Pipeline(ranks=2, chunks=2, v_shaped=True)


def text(order: list[Action], pipeline: Pipeline, rank: int) -> str:
    """`F0` for the first stage of a rank, `f0` for its second."""
    words = []
    for kind, microbatch, stage in order:
        chunk = pipeline.stages_of(rank).index(stage)
        words.append(f"{kind if chunk == 0 else kind.lower()}{microbatch}")
    return " ".join(words)


def texts(orders: Orders, pipeline: Pipeline) -> list[str]:
    return [text(order, pipeline, rank) for rank, order in enumerate(orders)]


@pytest.mark.parametrize(
    ("schedule", "pipeline", "microbatches", "golden"),
    [
        (
            one_forward_one_backward,
            Pipeline(4),
            8,
            [
                "F0 F1 F2 F3 B0 F4 B1 F5 B2 F6 B3 F7 B4 B5 B6 B7",
                "F0 F1 F2 B0 F3 B1 F4 B2 F5 B3 F6 B4 F7 B5 B6 B7",
                "F0 F1 B0 F2 B1 F3 B2 F4 B3 F5 B4 F6 B5 F7 B6 B7",
                "F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5 F6 B6 F7 B7",
            ],
        ),
        (
            one_forward_one_backward,
            Pipeline(4),
            2,
            ["F0 F1 B0 B1", "F0 F1 B0 B1", "F0 F1 B0 B1", "F0 B0 F1 B1"],
        ),
        (one_forward_one_backward, Pipeline(4), 1, ["F0 B0"] * 4),
        (one_forward_one_backward, Pipeline(1), 3, ["F0 B0 F1 B1 F2 B2"]),
        (gpipe, Pipeline(2), 3, ["F0 F1 F2 B0 B1 B2"] * 2),
        (gpipe, LOOP, 2, ["F0 F1 f0 f1 b0 b1 B0 B1"] * 2),
        (
            interleaved,
            LOOP,
            4,
            [
                "F0 F1 f0 f1 F2 b0 F3 b1 f2 B0 f3 B1 b2 b3 B2 B3",
                "F0 F1 f0 b0 f1 b1 F2 B0 F3 B1 f2 b2 f3 b3 B2 B3",
            ],
        ),
        # Three microbatches are one group of three, five are groups of three and two.
        (
            interleaved,
            LOOP,
            3,
            ["F0 F1 F2 f0 f1 f2 b0 b1 b2 B0 B1 B2", "F0 F1 F2 f0 b0 f1 b1 f2 b2 B0 B1 B2"],
        ),
        (
            interleaved,
            LOOP,
            5,
            [
                "F0 F1 F2 f0 f1 f2 b0 F3 b1 F4 b2 f3 B0 f4 B1 B2 b3 b4 B3 B4",
                "F0 F1 F2 f0 b0 f1 b1 f2 b2 F3 B0 F4 B1 f3 B2 f4 b3 b4 B3 B4",
            ],
        ),
        (
            zb_h1,
            Pipeline(3),
            4,
            [
                "F0 F1 F2 I0 W0 F3 I1 W1 I2 W2 I3 W3",
                "F0 F1 I0 F2 I1 W0 F3 I2 W1 I3 W2 W3",
                "F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 W2 W3",
            ],
        ),
        (
            zb_v,
            V_SHAPE,
            4,
            [
                "F0 F1 F2 f0 i0 w0 f1 i1 w1 F3 I0 W0 f2 i2 w2 I1 W1 f3 i3 w3 I2 W2 I3 W3",
                "F0 f0 F1 f1 i0 w0 F2 I0 W0 f2 i1 w1 F3 I1 W1 f3 i2 w2 I2 i3 I3 W2 w3 W3",
            ],
        ),
        (forward_only, Pipeline(2), 3, ["F0 F1 F2"] * 2),
        (forward_only, LOOP, 4, ["F0 F1 f0 f1 F2 F3 f2 f3"] * 2),
        (forward_only, V_SHAPE, 4, ["F0 F1 f0 f1 F2 F3 f2 f3"] * 2),
    ],
)
def test_golden_orders(schedule, pipeline, microbatches, golden):
    assert texts(schedule(pipeline, microbatches), pipeline) == golden


def test_a_larger_group_passes_the_first_stage_together():
    order = interleaved(LOOP, 8, group=4)[1]
    assert text(order, LOOP, 1).startswith("F0 F1 F2 F3 f0 b0 f1 b1 f2 b2 f3 b3 F4 B0")
    # A group of fewer than p would let the ranks wait: it is made larger.
    assert interleaved(Pipeline(4, 2), 8, group=1) == interleaved(Pipeline(4, 2), 8)


def test_which_rank_holds_which_stage():
    assert [LOOP.stages_of(rank) for rank in range(2)] == [[0, 2], [1, 3]]
    assert [V_SHAPE.stages_of(rank) for rank in range(2)] == [[0, 3], [1, 2]]
    for pipeline in (Pipeline(3, 4), Pipeline(5, 2, v_shaped=True), Pipeline(1, 3)):
        held = []
        for rank in range(pipeline.ranks):
            held += pipeline.stages_of(rank)
            assert all(pipeline.rank_of(stage) == rank for stage in pipeline.stages_of(rank))
        assert sorted(held) == list(range(pipeline.stages))


@pytest.mark.parametrize("p", [1, 2, 3, 4, 7])
def test_microbatches_in_flight(p):
    """The peak of each rank over its stages, by the formula of each schedule."""
    for m in (1, 2, p, p + 1, 2 * p, 3 * p + 1):
        plain = Pipeline(p)
        assert _peaks(one_forward_one_backward(plain, m)) == [min(p - rank, m) for rank in range(p)]
        assert _peaks(gpipe(plain, m)) == [m] * p
        assert _peaks(gpipe(Pipeline(p, 3), m)) == [3 * m] * p
        assert _peaks(zb_h1(plain, m)) == [min(p, m)] * p
        expected = [min(2 * p, 2 * m, m + 1 + rank) for rank in range(p)]
        assert _peaks(zb_v(Pipeline(p, 2, v_shaped=True), m)) == expected
        for v in (2, 3):
            largest = -(-m // max(1, m // p))
            expected = []
            for rank in range(p):
                expected.append(min(v * m, 2 * (p - rank - 1) + (v - 1) * largest + 1))
            assert _peaks(interleaved(Pipeline(p, v), m)) == expected


def _peaks(orders: Orders) -> list[int]:
    return [sum(peak_in_flight(order).values()) for order in orders]


def test_peak_in_flight_by_stage():
    """At the fullest moment, not the most of each stage at any."""
    first, last = (peak_in_flight(order) for order in interleaved(LOOP, 4))
    assert (first, last) == ({0: 3, 2: 2}, {1: 2, 3: 1})
    # Activations are kept until the weight gradient has run.
    order = [Action(kind, 0, 0) for kind in "FIW"] + [Action("F", 1, 0)]
    assert peak_in_flight(order) == {0: 1}
    assert peak_in_flight([order[0], order[1], order[3], order[2]]) == {0: 2}
    assert peak_in_flight([]) == {}


def test_the_schedule_of_a_configuration():
    for name, schedule in SCHEDULES.items():
        config = ParallelConfig(
            pipeline_model_parallel_size=2,
            pipeline_schedule=name,
            num_virtual_stages_per_pipeline_rank=schedule.chunks.start,
        )
        pipeline = pipeline_of(config)
        assert pipeline == Pipeline(2, schedule.chunks.start, name == "zb-v")
        assert training_orders(config, 4) == schedule.orders(pipeline, 4)
        kinds = {action.kind for order in training_orders(config, 4) for action in order}
        assert kinds == set("FIW" if schedule.splits_backward else "FB")
    config = ParallelConfig(
        pipeline_model_parallel_size=2,
        pipeline_schedule="interleaved",
        num_virtual_stages_per_pipeline_rank=2,
        microbatch_group_size_per_virtual_pipeline_stage=4,
    )
    assert training_orders(config, 8) == interleaved(LOOP, 8, group=4)
