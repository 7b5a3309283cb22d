"""Pipeline schedules as data. Pure, no torch.

A schedule is, for each stage, the order of its forwards and backwards. `program` adds the messages that those need,
`validate` proves a set of programs complete and free of deadlock, and `pipeline.engine` runs one. A new schedule is a
new function of a few lines that returns actions.
"""

from collections.abc import Callable
from typing import NamedTuple

FORWARD, BACKWARD = "F", "B"


class Action(NamedTuple):
    """Compute the forward ("F") or backward ("B") of a microbatch on one stage."""

    kind: str
    microbatch: int


class Message(NamedTuple):
    """The output of `source`'s action, on its way to the same action of `target`, a neighbouring stage."""

    kind: str
    microbatch: int
    source: int
    target: int


class Step(NamedTuple):
    """Post all `messages` at once, wait for those that arrive here, then compute `action` (None in the last step)."""

    messages: tuple[Message, ...]
    action: Action | None


def gpipe(stages: int, stage: int, microbatches: int) -> list[Action]:
    """All forwards, then all backwards (Huang et al. 2019). Every stage holds all m microbatches at its peak."""
    return [Action(kind, i) for kind in (FORWARD, BACKWARD) for i in range(microbatches)]


def one_forward_one_backward(stages: int, stage: int, microbatches: int) -> list[Action]:
    """1F1B (Narayanan et al. 2021): warm up with min(p - stage - 1, m) forwards, then alternate. Stage r holds at most
    min(p - r, m) microbatches; bubble (p - 1) / m of the ideal time, as GPipe's."""
    warmup = min(stages - stage - 1, microbatches)
    actions = [Action(FORWARD, i) for i in range(warmup)]
    for i in range(microbatches - warmup):
        actions += [Action(FORWARD, warmup + i), Action(BACKWARD, i)]
    return actions + [Action(BACKWARD, i) for i in range(microbatches - warmup, microbatches)]


def forward_only(stages: int, stage: int, microbatches: int) -> list[Action]:
    """Forwards without backwards, for evaluation."""
    return [Action(FORWARD, i) for i in range(microbatches)]


def peak_in_flight(actions: list[Action]) -> int:
    """Microbatches whose activations a stage holds at the fullest moment of its actions: those whose forward has run
    and whose backward has not."""
    peak = in_flight = 0
    for action in actions:
        in_flight += 1 if action.kind == FORWARD else -1
        peak = max(peak, in_flight)
    return peak


def schedule_named(name: str) -> Callable[[int, int, int], list[Action]]:
    """The schedule function of a --pipeline-schedule value. Raises ValueError for an unknown name."""
    known = {"1f1b": one_forward_one_backward, "gpipe": gpipe}
    if name not in known:
        raise ValueError(f"no pipeline schedule {name!r}; there are {', '.join(known)}")
    return known[name]


def _arriving(action: Action, stage: int, stages: int) -> tuple[Message, ...]:
    source = stage - 1 if action.kind == FORWARD else stage + 1
    return (Message(*action, source, stage),) if 0 <= source < stages else ()


def _leaving(action: Action, stage: int, stages: int) -> tuple[Message, ...]:
    target = stage + 1 if action.kind == FORWARD else stage - 1
    return (Message(*action, stage, target),) if 0 <= target < stages else ()


def program(actions: list[Action], stage: int, stages: int) -> list[Step]:
    """Add the messages: between two actions, what the first one made leaves and what the second one needs arrives.

    Both are posted together, so opposing messages of a pair of stages, as 1F1B has them, cannot wait for each other.
    """
    steps, leaving = [], ()
    for action in actions:
        steps.append(Step(leaving + _arriving(action, stage, stages), action))
        leaving = _leaving(action, stage, stages)
    return [*steps, Step(leaving, None)] if leaving else steps


class ScheduleError(ValueError):
    """A schedule that is incomplete, out of order, or would deadlock."""


def validate(schedules: list[list[Action]], microbatches: int, backward: bool = True) -> None:
    """Check the schedules of all stages against each other. Raises ScheduleError saying what is wrong and where.

    Complete: each stage runs each microbatch's forward once, then its backward once. No deadlock even when a step ends
    only once all its messages, sent ones too, have been met by their counterparts, pairwise in order of posting (as
    NCCL, which knows no tags, matches them).
    """
    kinds = (FORWARD, BACKWARD) if backward else (FORWARD,)
    expected = sorted(Action(kind, i) for kind in kinds for i in range(microbatches))
    for stage, actions in enumerate(schedules):
        if sorted(actions) != expected:
            wrong = set(expected).symmetric_difference(actions) or "a repeated action"
            raise ScheduleError(f"stage {stage} does not run each action exactly once: {wrong}")
        place = {action: at for at, action in enumerate(actions)}
        for i in range(microbatches if backward else 0):
            if place[Action(BACKWARD, i)] < place[Action(FORWARD, i)]:
                raise ScheduleError(
                    f"stage {stage} runs the backward of microbatch {i} before its forward"
                )
    validate_messages(
        [program(actions, stage, len(schedules)) for stage, actions in enumerate(schedules)]
    )


def validate_messages(programs: list[list[Step]]) -> None:
    """Go through all stages' programs with messages that block until met; raise ScheduleError when no stage can go on,
    or when two stages do not post the same messages in the same order."""
    at = [0] * len(programs)
    waiting: list[list[Message]] = [list(steps[0].messages) if steps else [] for steps in programs]

    def first_between(stage, source, target):
        return next((m for m in waiting[stage] if (m.source, m.target) == (source, target)), None)

    while any(at[stage] < len(steps) for stage, steps in enumerate(programs)):
        moved = False
        for stage, steps in enumerate(programs):
            for message in list(waiting[stage]):
                if message != first_between(stage, message.source, message.target):
                    continue
                peer = message.target if message.source == stage else message.source
                met = first_between(peer, message.source, message.target)
                if met is not None and met != message:
                    raise ScheduleError(
                        f"stages {stage} and {peer} post different messages: {message} and {met}"
                    )
                if met is not None:
                    waiting[stage].remove(message)
                    waiting[peer].remove(message)
                    moved = True
            if at[stage] < len(steps) and not waiting[stage]:
                at[stage] += 1
                waiting[stage] = list(steps[at[stage]].messages) if at[stage] < len(steps) else []
                moved = True
        if not moved:
            stuck = {stage: messages for stage, messages in enumerate(waiting) if messages}
            raise ScheduleError(
                f"deadlock: stages wait for messages that nobody will meet: {stuck}"
            )
