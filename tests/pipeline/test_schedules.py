"""Schedules as data: golden orders, memory, and a validator that finds what is wrong."""

import pytest

from megalite.pipeline.schedules import (
    Action,
    Message,
    ScheduleError,
    Step,
    forward_only,
    gpipe,
    one_forward_one_backward,
    peak_in_flight,
    program,
    schedule_named,
    validate,
    validate_messages,
)


def text(actions: list[Action]) -> str:
    return " ".join(f"{action.kind}{action.microbatch}" for action in actions)


def actions(text: str) -> list[Action]:
    return [Action(word[0], int(word[1:])) for word in text.split()]


@pytest.mark.parametrize(
    ("schedule", "microbatches", "golden"),
    [
        (
            one_forward_one_backward,
            8,
            [
                "F0 F1 F2 F3 B0 F4 B1 F5 B2 F6 B3 F7 B4 B5 B6 B7",
                "F0 F1 F2 B0 F3 B1 F4 B2 F5 B3 F6 B4 F7 B5 B6 B7",
                "F0 F1 B0 F2 B1 F3 B2 F4 B3 F5 B4 F6 B5 F7 B6 B7",
                "F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5 F6 B6 F7 B7",
            ],
        ),
        (one_forward_one_backward, 2, ["F0 F1 B0 B1", "F0 F1 B0 B1", "F0 F1 B0 B1", "F0 B0 F1 B1"]),
        (one_forward_one_backward, 1, ["F0 B0"] * 4),
        (one_forward_one_backward, 3, ["F0 B0 F1 B1 F2 B2"]),
        (gpipe, 3, ["F0 F1 F2 B0 B1 B2"] * 2),
        (forward_only, 3, ["F0 F1 F2"] * 2),
    ],
)
def test_golden_orders(schedule, microbatches, golden):
    assert [
        text(schedule(len(golden), stage, microbatches)) for stage in range(len(golden))
    ] == golden


@pytest.mark.parametrize("stages", range(1, 9))
def test_every_size_is_sound_and_keeps_its_memory(stages):
    for microbatches in range(1, 13):
        for schedule in (one_forward_one_backward, gpipe, forward_only):
            all_stages = [schedule(stages, stage, microbatches) for stage in range(stages)]
            validate(all_stages, microbatches, backward=schedule is not forward_only)
            if schedule is one_forward_one_backward:
                expected = [min(stages - stage, microbatches) for stage in range(stages)]
                assert [peak_in_flight(one) for one in all_stages] == expected
            if schedule is gpipe:
                assert [peak_in_flight(one) for one in all_stages] == [microbatches] * stages


def test_program_posts_what_leaves_with_what_arrives():
    """The steady state of the middle of three stages: opposing messages to a neighbour stand in one
    step."""
    steps = program(actions("F0 F1 B0 B1"), stage=1, stages=3)
    assert steps == [
        Step((Message("F", 0, 0, 1),), Action("F", 0)),
        Step((Message("F", 0, 1, 2), Message("F", 1, 0, 1)), Action("F", 1)),
        Step((Message("F", 1, 1, 2), Message("B", 0, 2, 1)), Action("B", 0)),
        Step((Message("B", 0, 1, 0), Message("B", 1, 2, 1)), Action("B", 1)),
        Step((Message("B", 1, 1, 0),), None),
    ]


def test_program_of_one_stage_has_no_messages():
    assert program(actions("F0 B0"), 0, 1) == [Step((), Action("F", 0)), Step((), Action("B", 0))]


def test_messages_arrive_before_they_are_used_and_leave_after_they_are_made():
    for stages in (2, 3, 5):
        for stage in range(stages):
            made = set()
            for step in program(one_forward_one_backward(stages, stage, 4), stage, stages):
                for message in step.messages:
                    key = Action(message.kind, message.microbatch)
                    assert (key in made) if message.source == stage else key == step.action
                made.add(step.action)


@pytest.mark.parametrize(
    ("stages", "complaint"),
    [
        (
            ["F0 F1 B0", "F0 B0 F1 B1"],
            "stage 0 does not run each action exactly once: .*kind='B', microbatch=1",
        ),
        (
            ["F0 F1 B0 B1", "F0 B0 F1 B1 B1"],
            "stage 1 does not run each action exactly once: .*microbatch=1.* is repeated",
        ),
        (["F0 F1 B0 B1 F2", "F0 B0 F1 B1"], "stage 0 does not .*microbatch=2"),
        (
            ["F0 F1 B0 B1", "F0 B1 F1 B0"],
            "stage 1 runs the backward of microbatch 1 before its forward",
        ),
        # Stage 0 waits for the first backward; the last stage wants another forward before it makes
        # that.
        (["F0 B0 F1 B1", "F0 F1 B0 B1"], "deadlock: stages wait"),
        (["F0 B0 F1 B1", "F0 F1 B0 B1", "F0 F1 B0 B1"], "deadlock: stages wait"),
        (
            ["F0 F1 B0 B1", "F1 F0 B0 B1"],
            "stages 1 and 0 post different messages: .*microbatch=1.*microbatch=0",
        ),
        (["F0 F1 B0 B1", "F0 F1 B1 B0"], "post different messages"),
    ],
)
def test_the_validator_finds(stages, complaint):
    with pytest.raises(ScheduleError, match=complaint):
        validate([actions(stage) for stage in stages], 2)


def test_opposing_messages_must_be_posted_together():
    """Two stages that each send first and receive afterwards: if sends block, neither gets to its
    receive."""
    forward, backward = Message("F", 1, 0, 1), Message("B", 0, 1, 0)

    def one_by_one(*messages):
        return [Step((message,), None) for message in messages]

    with pytest.raises(ScheduleError, match="deadlock"):
        validate_messages([one_by_one(forward, backward), one_by_one(backward, forward)])
    validate_messages([[Step((forward, backward), None)], one_by_one(backward, forward)])
    validate_messages([one_by_one(forward, backward), one_by_one(forward, backward)])


def test_an_evaluation_has_no_backwards():
    with pytest.raises(ScheduleError, match="does not run"):
        validate([one_forward_one_backward(1, 0, 2)], 2, backward=False)


def test_schedules_by_name():
    assert schedule_named("1f1b") is one_forward_one_backward and schedule_named("gpipe") is gpipe
    with pytest.raises(ValueError, match="no pipeline schedule 'zb'; there are 1f1b, gpipe"):
        schedule_named("zb")
