"""The messages of a schedule, and the proof that it is complete and free of deadlock. Pure, no
torch.

Between two ranks messages have no names (NCCL knows none): a receive takes the next message that
the other rank has sent. Both sides know the order of both ranks' computations, and so the order of
what is sent: receives are posted in that order.
"""

import math
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from megalite.pipeline.schedules import (
    BACKWARD,
    FORWARD,
    INPUT,
    WEIGHT,
    Action,
    Orders,
    Pipeline,
    ScheduleError,
)
from megalite.pipeline.simulate import Timeline, simulate


class Message(NamedTuple):
    """What one stage computes and a neighbouring stage needs."""

    kind: str
    """FORWARD: hidden states; BACKWARD: their gradient."""
    microbatch: int
    source: int
    """The stage that computes it."""
    target: int

    def __str__(self) -> str:
        what = "hidden states" if self.kind == FORWARD else "gradient"
        return f"{what} of microbatch {self.microbatch} from stage {self.source} to {self.target}"


class Step(NamedTuple):
    """One computation of a rank, and the messages before it."""

    receives: tuple[Message, ...]
    """Receives to post first, in this order: what this action needs from other ranks, if it is not
    posted yet, and what is made while it runs."""
    action: Action
    """What to compute, once what it needs has arrived. What it makes is sent at once."""


def needed(action: Action, pipeline: Pipeline) -> Message | None:
    """What an action needs from another stage."""
    stage = action.stage
    if action.kind == FORWARD and stage > 0:
        return Message(FORWARD, action.microbatch, stage - 1, stage)
    if action.kind in (BACKWARD, INPUT) and stage < pipeline.stages - 1:
        return Message(BACKWARD, action.microbatch, stage + 1, stage)
    return None


def made(action: Action, pipeline: Pipeline) -> Message | None:
    """What an action makes for another stage."""
    stage = action.stage
    if action.kind == FORWARD and stage < pipeline.stages - 1:
        return Message(FORWARD, action.microbatch, stage, stage + 1)
    if action.kind in (BACKWARD, INPUT) and stage > 0:
        return Message(BACKWARD, action.microbatch, stage, stage - 1)
    return None


def is_sent(message: Message | None, pipeline: Pipeline) -> bool:
    """Whether there is a message that leaves its rank: the two stages may be on one."""
    return message is not None and (
        pipeline.rank_of(message.source) != pipeline.rank_of(message.target)
    )


def program(timeline: Timeline, pipeline: Pipeline, rank: int) -> list[Step]:
    """A rank's order of a simulated schedule, with its messages.

    Each rank posts its sends and its receives in the order in which the messages are made in the
    simulation. So a receive is posted early, while the rank still computes something else, and no
    two ranks can wait for each other's messages, whatever their computations really take.
    """
    coming = []
    for spans in timeline.spans:
        for action, _, end in spans:
            message = made(action, pipeline)
            if is_sent(message, pipeline) and pipeline.rank_of(message.target) == rank:
                coming.append((_place(message, end), message))
    coming.sort(reverse=True)

    steps = []
    for action, _, end in timeline.spans[rank]:
        # Receives whose place is before that of what this action sends, or, where it sends nothing,
        # of all that is made until its end.
        sent = made(action, pipeline)
        place = _place(sent, end) if is_sent(sent, pipeline) else (math.nextafter(end, math.inf),)
        receives = []
        while coming and coming[-1][0] < place:
            receives.append(coming.pop()[1])
        steps.append(Step(tuple(receives), action))
    return steps


def _place(message: Message, end: float) -> tuple:
    """Where a message that is made at a time stands in the order of all messages. Of those that are
    made at the same time, what flows to a rank comes before what the rank makes of the one before
    it."""
    direction = message.target - message.source
    return end, message.kind, direction * message.source, message.microbatch


def validate(orders: Orders, pipeline: Pipeline, microbatches: int, backward: bool = True) -> None:
    """Check the orders of all ranks. Raises ScheduleError that says what is wrong and where.

    Complete: each rank runs, for each microbatch on each of its stages, the forward once, and after
    it the whole backward once, or its two parts in order.

    Free of deadlock, even where every send and receive of a rank waits until those that it has
    posted before are done: as on one stream of a GPU, where NCCL runs them one after the other. No
    backend does less.
    """
    if len(orders) != pipeline.ranks:
        raise ScheduleError(f"orders of {len(orders)} ranks for a pipeline of {pipeline.ranks}")
    for rank, order in enumerate(orders):
        _validate_order(rank, order, pipeline, microbatches, backward)
    timeline = simulate(orders, pipeline)
    programs = [program(timeline, pipeline, rank) for rank in range(pipeline.ranks)]
    validate_messages(programs, pipeline)


def _validate_order(
    rank: int, order: Sequence[Action], pipeline: Pipeline, microbatches: int, backward: bool
) -> None:
    """All of a rank's actions once, each after those that it follows."""
    done: set[Action] = set()
    follows = {BACKWARD: FORWARD, INPUT: FORWARD, WEIGHT: INPUT}
    for action in order:
        kind, microbatch, stage = action
        if stage not in pipeline.stages_of(rank) or not 0 <= microbatch < microbatches:
            raise ScheduleError(f"rank {rank} runs {action}, which it does not have")
        before = follows.get(kind)
        if before is not None and Action(before, microbatch, stage) not in done:
            raise ScheduleError(f"rank {rank} runs {action} before {before}{microbatch}")
        if action in done:
            raise ScheduleError(f"rank {rank} runs {action} twice")
        done.add(action)
    for stage in pipeline.stages_of(rank):
        for microbatch in range(microbatches):
            kinds = {kind for kind in "FBIW" if Action(kind, microbatch, stage) in done}
            right = [{FORWARD, BACKWARD}, {FORWARD, INPUT, WEIGHT}] if backward else [{FORWARD}]
            if kinds not in right:
                ran = " and ".join(sorted(kinds)) or "nothing"
                raise ScheduleError(
                    f"rank {rank} runs {ran} of microbatch {microbatch} on stage {stage}"
                )


def validate_messages(programs: list[list[Step]], pipeline: Pipeline) -> None:
    """Run the programs of all ranks, where every message of a rank waits for those that it has
    posted before. Raises ScheduleError that names what each rank waits for, when none can go on."""
    position = [0] * len(programs)
    posted = [False] * len(programs)
    arrived: set[Message] = set()
    # What each rank has posted and is not done.
    queues: list[deque[Message]] = [deque() for _ in programs]
    moved = True
    while moved:
        moved = False
        for rank, steps in enumerate(programs):
            while position[rank] < len(steps):
                step = steps[position[rank]]
                if not posted[rank]:
                    queues[rank] += step.receives
                    posted[rank] = True
                message = needed(step.action, pipeline)
                if is_sent(message, pipeline) and message not in arrived:
                    break
                message = made(step.action, pipeline)
                if is_sent(message, pipeline):
                    queues[rank].append(message)
                position[rank] += 1
                posted[rank] = False
                moved = True
        # A message is delivered when it is the next of both its ranks.
        for queue in queues:
            while queue:
                message = queue[0]
                source = queues[pipeline.rank_of(message.source)]
                target = queues[pipeline.rank_of(message.target)]
                if not (source and target and source[0] == target[0]):
                    break
                source.popleft()
                target.popleft()
                arrived.add(message)
                moved = True
    stuck = []
    for rank, steps in enumerate(programs):
        if position[rank] < len(steps):
            action = steps[position[rank]].action
            stuck.append(f"rank {rank} waits for the {needed(action, pipeline)}")
    left = [str(queue[0]) for queue in queues if queue]
    if stuck or left:
        raise ScheduleError("deadlock: " + "; ".join(stuck or left))
