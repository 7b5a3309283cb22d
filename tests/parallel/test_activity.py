"""What a rank notes about its calls and its time. Pure."""

import pytest

from megalite.parallel.activity import Activity


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_phases_exclude_each_other(clock):
    activity = Activity(clock)
    clock.now = 1  # belongs to no phase
    with activity.timed("forward"):
        clock.now = 3
        with activity.waits(activity.record("all_reduce", "tensor", (0, 1))):
            clock.now = 7
        clock.now = 8
    assert activity.take_seconds() == {"forward": 3, "communication": 4}
    assert activity.take_seconds() == {}


def test_a_phase_that_is_not_over_counts_so_far_and_then_from_there(clock):
    activity = Activity(clock)
    with activity.timed("optimizer"):
        clock.now = 2
        assert activity.take_seconds() == {"optimizer": 2}
        clock.now = 5
    assert activity.take_seconds() == {"optimizer": 3}


def test_idle_only_where_something_should_happen(clock):
    activity = Activity(clock)
    clock.now = 5
    assert activity.idle_seconds == 0  # starting takes its time
    activity.set_state("training", 1)
    clock.now = 7
    assert activity.idle_seconds == 2
    with activity.waits(activity.record("gather_objects", "control", (0, 1), untimed=True)):
        clock.now = 70
        assert activity.idle_seconds == 0
    activity.set_state("saving")
    with activity.waits(activity.record("all_reduce", "data", (0, 1))):
        clock.now = 90
        assert activity.idle_seconds == 20


def test_calls_are_counted_by_group_and_transfers_by_their_ends():
    activity = Activity()
    calls = [
        ("all_reduce", "data", (0, 1)),
        ("barrier", "data", (0, 1)),
        ("transfer", "data", (0, 1)),
    ]
    numbers = [
        activity.record(*call).number for call in [*calls, calls[2], ("transfer", "data", (1, 0))]
    ]
    assert numbers == [1, 2, 1, 2, 1]
