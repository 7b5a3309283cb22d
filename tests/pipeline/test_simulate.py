"""Simulated schedules against the formulas of their papers, and a timeline by hand."""

import pytest

from megalite.pipeline.schedules import (
    Action,
    Pipeline,
    ScheduleError,
    gpipe,
    interleaved,
    one_forward_one_backward,
    zb_h1,
    zb_v,
)
from megalite.pipeline.simulate import Timeline, simulate

EQUAL = {"F": 1, "I": 1, "W": 1}
SIZES = [(p, m) for p in (2, 3, 5, 8) for m in (p, p + 1, 2 * p, 3 * p - 1, 8 * p)]
SIZES += [(32, 32), (32, 65)]


def run(schedule, p: int, m: int, *, v: int = 1, seconds: dict[str, float], **options) -> Timeline:
    """The schedule with these times of a whole rank's forward, input and weight gradients, of
    which each of v stages takes its share. They are whole numbers, so sums are exact."""
    times = seconds | {"B": seconds["I"] + seconds["W"]}
    pipeline = Pipeline(p, v, v_shaped=schedule is zb_v)
    return simulate(schedule(pipeline, m, **options), pipeline, lambda action: times[action.kind])


def overhead(timeline: Timeline, m: int, *, v: int, seconds: dict[str, float]) -> float:
    """The makespan beyond the time of a rank's own computations."""
    busy = m * v * sum(seconds.values())
    assert timeline.busy == [busy] * len(timeline.spans)
    return timeline.seconds - busy


@pytest.mark.parametrize("seconds", [EQUAL, {"F": 3, "I": 4, "W": 2}, {"F": 2, "I": 1, "W": 5}])
@pytest.mark.parametrize("schedule", [one_forward_one_backward, gpipe])
def test_plain_schedules_idle_for_p_minus_one_microbatches(schedule, seconds):
    """Narayanan et al. 2021, section 2.2.1: (p - 1)(F + B), for any m."""
    for p, m in [*SIZES, (8, 1), (8, 3)]:
        timeline = run(schedule, p, m, seconds=seconds)
        bubble = (p - 1) * sum(seconds.values())
        assert overhead(timeline, m, v=1, seconds=seconds) == bubble
        assert timeline.bubble == pytest.approx((p - 1) / m)
        # The first rank is idle for all of it; the last begins when the first forward arrives.
        assert timeline.idle[0] == bubble
        assert timeline.idle[-1] == 0 if schedule is one_forward_one_backward else True


@pytest.mark.parametrize("seconds", [EQUAL, {"F": 3, "I": 4, "W": 2}])
@pytest.mark.parametrize(("schedule", "v"), [(interleaved, 2), (interleaved, 3), (gpipe, 2)])
def test_v_stages_on_a_rank_idle_a_vth_of_that(schedule, v, seconds):
    """Narayanan et al. 2021, section 2.2.2, for all m >= p: (p - 1)(F + B) of one of v stages."""
    for p, m in SIZES:
        timeline = run(schedule, p, m, v=v, seconds=seconds)
        assert overhead(timeline, m, v=v, seconds=seconds) == (p - 1) * sum(seconds.values())
        assert timeline.bubble == pytest.approx((p - 1) / (m * v))


def test_the_formulas_hold_for_many_ranks_and_microbatches():
    p = 32
    m = 8 * p
    busy = 3 * m
    sizes = [(one_forward_one_backward, 1, 3), (interleaved, 2, 1.5), (zb_h1, 1, 1), (zb_v, 2, 0.5)]
    for schedule, v, bubble in sizes:
        timeline = run(schedule, p, m, v=v, seconds=EQUAL)
        assert timeline.seconds / v == busy + bubble * (p - 1)


def test_groups_change_no_bubble():
    for p, m, group in ((4, 16, 8), (4, 16, 5), (3, 11, 5), (2, 12, 6)):
        timeline = run(interleaved, p, m, v=2, seconds=EQUAL, group=group)
        assert overhead(timeline, m, v=2, seconds=EQUAL) == 3 * (p - 1)


@pytest.mark.parametrize(
    "seconds", [EQUAL, {"F": 3, "I": 4, "W": 2}, {"F": 2, "I": 4, "W": 2}, {"F": 5, "I": 3, "W": 1}]
)
def test_zb_h1_idles_for_f_plus_i_minus_w(seconds):
    """Qi et al. 2023, table 1: (p - 1)(F + I - W), where W is no longer than F and I."""
    for p, m in SIZES:
        timeline = run(zb_h1, p, m, seconds=seconds)
        bubble = (p - 1) * (seconds["F"] + seconds["I"] - seconds["W"])
        assert overhead(timeline, m, v=1, seconds=seconds) == bubble
        assert timeline.idle[0] == bubble


def test_zb_v_is_never_idle():
    """Qi et al. 2023, section 6: no rank waits between its first and its last computation where F,
    I and W are equal and m >= 2p. Ranks begin one after the other, (p - 1) F of a stage apart."""
    for p, m in SIZES:
        timeline = run(zb_v, p, m, v=2, seconds=EQUAL)
        if m >= 2 * p:
            assert timeline.idle == [0] * p
            assert overhead(timeline, m, v=2, seconds=EQUAL) == p - 1
    # Fewer microbatches do not fill it.
    assert max(run(zb_v, 4, 5, v=2, seconds=EQUAL).idle) > 0


def test_zb_v_with_shorter_weight_gradients():
    """As fast where F = I >= W: what is missing at the end of a rank was not waited for."""
    for p, m in SIZES:
        if m >= 2 * p:
            seconds = {"F": 2, "I": 2, "W": 1}
            timeline = run(zb_v, p, m, v=2, seconds=seconds)
            assert overhead(timeline, m, v=2, seconds=seconds) == 2 * (p - 1)


def test_a_timeline_by_hand():
    """Two ranks, one microbatch: forwards of 1 s, backwards of 2 s, messages of 0.25 s."""
    pipeline = Pipeline(2)
    orders = one_forward_one_backward(pipeline, 1)
    timeline = simulate(orders, pipeline, transfer_seconds=0.25)
    assert timeline.spans == [
        [(Action("F", 0, 0), 0.0, 1.0), (Action("B", 0, 0), 4.5, 6.5)],
        [(Action("F", 0, 1), 1.25, 2.25), (Action("B", 0, 1), 2.25, 4.25)],
    ]
    assert timeline.seconds == 6.5
    assert timeline.busy == [3.0, 3.0]
    assert timeline.idle == [3.5, 0.0]
    assert timeline.bubble == pytest.approx(2 * 6.5 / 6 - 1)


def test_a_slow_stage_sets_the_pace():
    pipeline = Pipeline(3)
    orders = one_forward_one_backward(pipeline, 10)
    timeline = simulate(orders, pipeline, lambda action: 3.0 if action.stage == 1 else 1.0)
    # Before the slow stage has its first input, after its last output, and its own work.
    assert timeline.seconds == 1 + 10 * 6 + 1
    assert timeline.idle[1] == 0


def test_messages_take_no_time_between_stages_of_one_rank():
    """The turn of the V is on the last rank: of the three messages of a forward, two travel."""
    pipeline = Pipeline(2, 2, v_shaped=True)
    orders = zb_v(pipeline, 1)
    seconds = [simulate(orders, pipeline, transfer_seconds=t).seconds for t in (0.0, 1.0)]
    assert seconds[1] - seconds[0] == 4


def test_nothing_takes_no_time():
    assert simulate([[], []], Pipeline(2)).seconds == 0.0
    assert simulate([[], []], Pipeline(2)).bubble == 0.0


def test_every_rank_that_waits_is_named():
    orders = [[Action("F", 0, 0), Action("B", 0, 0)], [Action("B", 0, 1), Action("F", 0, 1)]]
    with pytest.raises(
        ScheduleError,
        match="rank 0 waits with B0 of stage 0 for I0 of stage 1; rank 1 waits with B0 of stage 1 "
        "for F0 of stage 1",
    ):
        simulate(orders, Pipeline(2))
