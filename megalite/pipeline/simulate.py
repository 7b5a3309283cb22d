"""How long a schedule takes, and where it is idle, from the times of its actions. Pure, no
torch."""

from collections.abc import Callable
from dataclasses import dataclass

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

UNIT_SECONDS = {FORWARD: 1.0, BACKWARD: 2.0, INPUT: 1.0, WEIGHT: 1.0}
"""A backward takes twice as long as a forward, and its two parts equally long."""


@dataclass(frozen=True)
class Timeline:
    """When each action of each rank runs."""

    spans: list[list[tuple[Action, float, float]]]
    """(action, start, end) of each rank, in order."""

    @property
    def seconds(self) -> float:
        """From the first start to the last end: the makespan."""
        starts = []
        ends = []
        for spans in self.spans:
            if spans:
                starts.append(spans[0][1])
                ends.append(spans[-1][2])
        return max(ends) - min(starts) if ends else 0.0

    @property
    def busy(self) -> list[float]:
        """Seconds that each rank computes."""
        seconds = []
        for spans in self.spans:
            seconds.append(sum(end - start for _, start, end in spans))
        return seconds

    @property
    def idle(self) -> list[float]:
        """Seconds that each rank waits between its first action and its last."""
        waits = []
        for spans, busy in zip(self.spans, self.busy):
            waits.append(spans[-1][2] - spans[0][1] - busy if spans else 0.0)
        return waits

    @property
    def bubble(self) -> float:
        """Time that ranks do not compute, as a share of the time that they do: the mean over
        ranks."""
        busy = sum(self.busy)
        return len(self.spans) * self.seconds / busy - 1 if busy else 0.0


def waits_for(action: Action, pipeline: Pipeline) -> list[Action]:
    """The actions whose results an action needs, the backward of the stage after it as its INPUT
    part."""
    kind, microbatch, stage = action
    if kind == FORWARD:
        return [Action(FORWARD, microbatch, stage - 1)] if stage > 0 else []
    if kind in (BACKWARD, INPUT):
        found = [Action(FORWARD, microbatch, stage)]
        if stage < pipeline.stages - 1:
            found.append(Action(INPUT, microbatch, stage + 1))
        return found
    return [Action(INPUT, microbatch, stage)]


def simulate(
    orders: Orders,
    pipeline: Pipeline,
    seconds: Callable[[Action], float] = lambda action: UNIT_SECONDS[action.kind],
    transfer_seconds: float = 0.0,
) -> Timeline:
    """Run the orders of all ranks: each action begins when the one before it on its rank has ended
    and what it needs has arrived.

    seconds: what an action takes. transfer_seconds: what a message between two ranks takes, during
    which both compute. Raises ScheduleError when ranks wait for each other.
    """
    rank_of = [pipeline.rank_of(stage) for stage in range(pipeline.stages)]
    ended: dict[Action, float] = {}
    spans: list[list[tuple[Action, float, float]]] = [[] for _ in orders]
    moved = True
    while moved:
        moved = False
        for rank, order in enumerate(orders):
            done = spans[rank]
            clock = done[-1][2] if done else 0.0
            while len(done) < len(order):
                action = order[len(done)]
                needs = waits_for(action, pipeline)
                if not all(need in ended for need in needs):
                    break
                start = clock
                for need in needs:
                    is_local = rank_of[need.stage] == rank
                    start = max(start, ended[need] + (0.0 if is_local else transfer_seconds))
                clock = start + seconds(action)
                done.append((action, start, clock))
                ended[action] = clock
                if action.kind == BACKWARD:
                    # What waits for the gradient of the input does not ask how it was computed.
                    ended[Action(INPUT, action.microbatch, action.stage)] = clock
                moved = True
    stuck = []
    for rank, order in enumerate(orders):
        if len(spans[rank]) < len(order):
            action = order[len(spans[rank])]
            for need in waits_for(action, pipeline):
                if need not in ended:
                    stuck.append(f"rank {rank} waits with {action} for {need}")
    if stuck:
        raise ScheduleError("deadlock: " + "; ".join(stuck))
    return Timeline(spans)
