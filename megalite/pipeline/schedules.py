"""Pipeline schedules as data. Pure, no torch.

A schedule is, for each stage, the order of its forwards and backwards. `program` adds the messages
that those need, `validate` proves a set of programs complete and free of deadlock, and
`pipeline.engine` runs one. A new schedule is a new function of a few lines that returns actions.
"""

from collections.abc import Callable
from typing import NamedTuple

FORWARD, BACKWARD = "F", "B"


class Action(NamedTuple):
    """Compute the forward ("F") or backward ("B") of a microbatch on one stage."""

    kind: str
    microbatch: int


class Message(NamedTuple):
    """The output of `source`'s action, on its way to the same action of `target`, a neighbouring
    stage."""

    kind: str
    microbatch: int
    source: int
    target: int


class Step(NamedTuple):
    """Post all `messages` at once, wait for those that arrive here, then compute `action` (None in
    the last step)."""

    messages: tuple[Message, ...]
    action: Action | None


def gpipe(stages: int, stage: int, microbatches: int) -> list[Action]:
    """All forwards, then all backwards (Huang et al. 2019). Every stage holds all m microbatches at
    its peak."""
    forwards = [Action(FORWARD, i) for i in range(microbatches)]
    backwards = [Action(BACKWARD, i) for i in range(microbatches)]
    return forwards + backwards


def one_forward_one_backward(stages: int, stage: int, microbatches: int) -> list[Action]:
    """1F1B (Narayanan et al. 2021): warm up with min(p - stage - 1, m) forwards, then alternate.

    Stage r holds at most min(p - r, m) microbatches; bubble (p - 1) / m of the ideal time, as
    GPipe's.
    """
    warmup = min(stages - stage - 1, microbatches)
    actions = [Action(FORWARD, i) for i in range(warmup)]
    for i in range(microbatches - warmup):
        actions += [Action(FORWARD, warmup + i), Action(BACKWARD, i)]
    for i in range(microbatches - warmup, microbatches):
        actions.append(Action(BACKWARD, i))
    return actions


def forward_only(stages: int, stage: int, microbatches: int) -> list[Action]:
    """Forwards without backwards, for evaluation."""
    return [Action(FORWARD, i) for i in range(microbatches)]


def peak_in_flight(actions: list[Action]) -> int:
    """Microbatches whose activations a stage holds at the fullest moment of its actions: those
    whose forward has run and whose backward has not."""
    peak = in_flight = 0
    for action in actions:
        if action.kind == FORWARD:
            in_flight += 1
        else:
            in_flight -= 1
        peak = max(peak, in_flight)
    return peak


def schedule_named(name: str) -> Callable[[int, int, int], list[Action]]:
    """The schedule function of a --pipeline-schedule value. Raises ValueError for an unknown
    name."""
    known = {"1f1b": one_forward_one_backward, "gpipe": gpipe}
    if name not in known:
        raise ValueError(f"no pipeline schedule {name!r}; there are {', '.join(known)}")
    return known[name]


def _message(action: Action, source: int, target: int, stages: int) -> tuple[Message, ...]:
    """The message between two stages, or none at an end of the pipeline."""
    if 0 <= source < stages and 0 <= target < stages:
        return (Message(action.kind, action.microbatch, source, target),)
    return ()


def program(actions: list[Action], stage: int, stages: int) -> list[Step]:
    """Add the messages: between two actions, what the first one made leaves and what the second one
    needs arrives.

    Both are posted together, so opposing messages of a pair of stages, as 1F1B has them, cannot
    wait for each other.
    """
    steps = []
    leaving: tuple[Message, ...] = ()
    for action in actions:
        # A forward comes from the stage before and goes to the one after; a backward the other way
        # round.
        direction = 1 if action.kind == FORWARD else -1
        arriving = _message(action, stage - direction, stage, stages)
        steps.append(Step(leaving + arriving, action))
        leaving = _message(action, stage, stage + direction, stages)
    if leaving:
        steps.append(Step(leaving, None))
    return steps


class ScheduleError(ValueError):
    """A schedule that is incomplete, out of order, or would deadlock."""


def validate(schedules: list[list[Action]], microbatches: int, backward: bool = True) -> None:
    """Check the schedules of all stages against each other. Raises ScheduleError saying what is
    wrong and where.

    Complete: each stage runs each microbatch's forward once, then its backward once. No deadlock
    even when a step ends only once all its messages, sent ones too, have been met by their
    counterparts, pairwise in order of posting (as NCCL, which knows no tags, matches them).
    """
    expected = {Action(FORWARD, i) for i in range(microbatches)}
    if backward:
        expected |= {Action(BACKWARD, i) for i in range(microbatches)}
    for stage, actions in enumerate(schedules):
        _validate_stage(stage, actions, expected)
    stages = len(schedules)
    validate_messages([program(actions, i, stages) for i, actions in enumerate(schedules)])


def _validate_stage(stage: int, actions: list[Action], expected: set[Action]) -> None:
    """Each expected action once, and a backward only after its forward."""
    done = set()
    for action in actions:
        if action in done or action not in expected:
            raise ScheduleError(
                f"stage {stage} does not run each action exactly once: {action} is repeated or "
                "unknown"
            )
        if action.kind == BACKWARD and Action(FORWARD, action.microbatch) not in done:
            raise ScheduleError(
                f"stage {stage} runs the backward of microbatch {action.microbatch} before its "
                "forward"
            )
        done.add(action)
    if done != expected:
        missing = sorted(expected - done)
        raise ScheduleError(f"stage {stage} does not run each action exactly once: {missing}")


def validate_messages(programs: list[list[Step]]) -> None:
    """Run all stages' programs with messages that block until they are met.

    Raises ScheduleError when no stage can go on, or when two stages do not post the same messages
    in the same order.
    """
    position = [0] * len(programs)
    waiting: list[list[Message]] = [_messages_at(steps, 0) for steps in programs]
    while any(position[stage] < len(steps) for stage, steps in enumerate(programs)):
        moved = False
        for stage, steps in enumerate(programs):
            # Messages that both ends have posted, in the same place of their queue, are delivered.
            for message in list(waiting[stage]):
                if _deliver(message, stage, waiting):
                    moved = True
            # A stage whose messages are all delivered computes, and posts those of its next step.
            if position[stage] < len(steps) and not waiting[stage]:
                position[stage] += 1
                waiting[stage] = _messages_at(steps, position[stage])
                moved = True
        if not moved:
            stuck = {stage: messages for stage, messages in enumerate(waiting) if messages}
            waits = f"stages wait for messages that nobody will meet: {stuck}"
            raise ScheduleError(f"deadlock: {waits}")


def _messages_at(steps: list[Step], position: int) -> list[Message]:
    return list(steps[position].messages) if position < len(steps) else []


def _first_between(messages: list[Message], source: int, target: int) -> Message | None:
    for message in messages:
        if (message.source, message.target) == (source, target):
            return message
    return None


def _deliver(message: Message, stage: int, waiting: list[list[Message]]) -> bool:
    """Deliver a message that both its ends wait for first among those between them; whether it was.

    Raises ScheduleError when the other end waits for another message in its place.
    """
    source = message.source
    target = message.target
    if message != _first_between(waiting[stage], source, target):
        return False
    peer = target if source == stage else source
    met = _first_between(waiting[peer], source, target)
    if met is None:
        return False
    if met != message:
        different = f"{message} and {met}"
        raise ScheduleError(f"stages {stage} and {peer} post different messages: {different}")
    waiting[stage].remove(message)
    waiting[peer].remove(message)
    return True
