"""Pipeline schedules as data. Pure, no torch.

A schedule is, for each rank, the order of its computations. `messages.py` adds the messages that
those need and proves a schedule complete and free of deadlock, `simulate.py` predicts how long it
takes, and `engine.py` runs it. A new schedule is a function of some lines that returns the orders
of all ranks, and an entry in SCHEDULES.

Letters: p ranks of a pipeline, v stages on each, m microbatches.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from megalite.parallel.config import ParallelConfig

FORWARD = "F"
BACKWARD = "B"
"""The whole backward."""
INPUT = "I"
"""The part of a backward that gives the gradient of the stage's input, which the stage before waits
for; B in Qi et al. 2023."""
WEIGHT = "W"
"""The rest of that backward: the gradients of the weights, which no other stage waits for."""


class Action(NamedTuple):
    """One computation: of one microbatch, on one stage of the model."""

    kind: str
    """FORWARD, BACKWARD, INPUT or WEIGHT."""
    microbatch: int
    stage: int
    """Counted over the whole model, from 0."""

    def __str__(self) -> str:
        return f"{self.kind}{self.microbatch} of stage {self.stage}"


NAMES = {
    FORWARD: "forward",
    BACKWARD: "backward",
    INPUT: "backward without weight gradients",
    WEIGHT: "weight gradients",
}
"""Kinds of actions, for a message."""


class ScheduleError(ValueError):
    """A schedule that is incomplete, out of order, or would deadlock."""


Orders = list[list[Action]]
"""What each rank of a pipeline computes, in order."""


@dataclass(frozen=True)
class Pipeline:
    """Which stages of a model each rank of a pipeline holds."""

    ranks: int = 1
    """p"""
    chunks: int = 1
    """Stages on each rank, v."""
    v_shaped: bool = False
    """Whether the second half of the stages goes back from the last rank to the first. Otherwise
    stage p follows stage p - 1 on the first rank again."""

    @property
    def stages(self) -> int:
        """Stages of the model, p v."""
        return self.ranks * self.chunks

    @property
    def rank_of_stage(self) -> tuple[int, ...]:
        """The rank that holds each stage, in the order of the model."""
        return tuple(self.rank_of(stage) for stage in range(self.stages))

    def rank_of(self, stage: int) -> int:
        """The rank that holds a stage."""
        chunk, position = divmod(stage, self.ranks)
        return self.ranks - 1 - position if self.v_shaped and chunk % 2 else position

    def stages_of(self, rank: int) -> list[int]:
        """The stages of a rank, in the order of the model."""
        return [stage for stage in range(self.stages) if self.rank_of(stage) == rank]


def describe(action: Action, pipeline: Pipeline) -> str:
    """`forward of microbatch 5 on stage 6 (chunk 1)`, for a message; without the stage where each
    rank holds one."""
    words = f"{NAMES[action.kind]} of microbatch {action.microbatch}"
    if pipeline.chunks > 1:
        chunk = pipeline.stages_of(pipeline.rank_of(action.stage)).index(action.stage)
        words += f" on stage {action.stage} (chunk {chunk})"
    return words


def one_forward_one_backward(pipeline: Pipeline, microbatches: int) -> Orders:
    """1F1B (Narayanan et al. 2021, figure 4, top): rank r warms up with p - r - 1 forwards, then
    alternates. It holds at most p - r microbatches, and is idle for (p - 1)(F + B)."""
    orders = []
    for rank in range(pipeline.ranks):
        order = [Action(FORWARD, i, rank) for i in range(microbatches)]
        backwards = [Action(BACKWARD, i, rank) for i in range(microbatches)]
        orders.append(_alternate(order, backwards, warmup=pipeline.ranks - rank - 1))
    return orders


def gpipe(pipeline: Pipeline, microbatches: int) -> Orders:
    """All forwards, then all backwards (Huang et al. 2019), stage by stage where a rank holds
    several (looped breadth-first: Lamy-Poirier 2023, figure 4d). Every rank holds all microbatches
    at its peak; idle as 1F1B, with several stages as interleaved 1F1B."""
    orders = []
    for rank in range(pipeline.ranks):
        stages = pipeline.stages_of(rank)
        order = []
        for stage in stages:
            order += [Action(FORWARD, i, stage) for i in range(microbatches)]
        for stage in reversed(stages):
            order += [Action(BACKWARD, i, stage) for i in range(microbatches)]
        orders.append(order)
    return orders


def interleaved(pipeline: Pipeline, microbatches: int, group: int | None = None) -> Orders:
    """Interleaved 1F1B (Narayanan et al. 2021, figure 4, bottom): microbatches pass in groups
    through the first stage of every rank, then through the second of every rank, and so on.

    Idle for (p - 1)(F + B) of one of the v stages, with any number of microbatches from p on.

    group: microbatches of a group, at least p (the default). They are divided evenly where they are
    no multiple of it: a group of fewer than p would let the others wait.
    """
    size = max(group or 0, pipeline.ranks)
    orders = []
    for rank in range(pipeline.ranks):
        stages = pipeline.stages_of(rank)
        forwards = []
        backwards = []
        largest = 0
        for members in _even_groups(microbatches, size):
            largest = max(largest, len(members))
            for stage in stages:
                forwards += [Action(FORWARD, i, stage) for i in members]
            for stage in reversed(stages):
                backwards += [Action(BACKWARD, i, stage) for i in members]
        warmup = 2 * (pipeline.ranks - rank - 1) + (len(stages) - 1) * largest
        orders.append(_alternate(forwards, backwards, warmup))
    return orders


def zb_h1(pipeline: Pipeline, microbatches: int) -> Orders:
    """ZB-H1 (Qi et al. 2023, figure 2): 1F1B with the backward divided. Rank r computes the weight
    gradients of a microbatch r backwards later, so that the gradients for the ranks before it leave
    early and its last weight gradients fill the time at the end.

    Idle for (p - 1)(F + I - W), a third of 1F1B's where the three take equally long. Every rank
    holds at most p microbatches, as the first rank of 1F1B does.
    """
    orders = []
    for rank in range(pipeline.ranks):
        warmup = min(pipeline.ranks - rank - 1, microbatches)
        order = [Action(FORWARD, i, rank) for i in range(warmup)]
        for i in range(microbatches):
            if warmup + i < microbatches:
                order.append(Action(FORWARD, warmup + i, rank))
            order.append(Action(INPUT, i, rank))
            if i >= rank:
                order.append(Action(WEIGHT, i - rank, rank))
        for i in range(max(0, microbatches - rank), microbatches):
            order.append(Action(WEIGHT, i, rank))
        orders.append(order)
    return orders


def zb_v(pipeline: Pipeline, microbatches: int) -> Orders:
    """ZB-V (Qi et al. 2023, section 6 and figure 6): two stages on each rank, from the first rank
    to the last and back, and the backward divided.

    With at least 2p microbatches no rank is idle between its first and its last computation where
    F, I and W take equally long. Every rank holds at most 2p of its stages' microbatches, as much
    as the first rank of 1F1B. The order for fewer microbatches is the same without those missing.
    """
    p = pipeline.ranks
    orders = []
    for rank in range(p):
        down, up = (_Next(stage, microbatches) for stage in pipeline.stages_of(rank))
        order: list[Action] = []
        # Fill the pipeline: forwards on the way down, until the first one comes back up.
        for _ in range(2 * (p - rank) - 1):
            order += down.next(FORWARD)
        for _ in range(rank):
            order += up.next(FORWARD)
            order += down.next(FORWARD)
        # The way up begins its backwards.
        for _ in range(p - rank):
            order += up.next(FORWARD)
            order += up.next(INPUT, WEIGHT)
        # One forward and one backward on each of the two stages in turn.
        while up.has(FORWARD):
            order += down.next(FORWARD)
            order += down.next(INPUT, WEIGHT)
            order += up.next(FORWARD)
            order += up.next(INPUT, WEIGHT)
        # Empty the pipeline: what other ranks wait for first.
        for _ in range(rank):
            order += down.next(INPUT)
            order += up.next(INPUT)
        for _ in range(p - rank):
            order += down.next(INPUT)
            order += down.next(WEIGHT)
        for stage in (up, down):
            while stage.has(INPUT):
                order += stage.next(INPUT)
            while stage.has(WEIGHT):
                order += stage.next(WEIGHT)
        orders.append(order)
    return orders


def forward_only(pipeline: Pipeline, microbatches: int) -> Orders:
    """Forwards without backwards, for evaluation: of each microbatch through all stages of a rank
    in groups of p, as `interleaved` has them."""
    orders = []
    for rank in range(pipeline.ranks):
        order = []
        for members in _even_groups(microbatches, pipeline.ranks):
            for stage in pipeline.stages_of(rank):
                order += [Action(FORWARD, i, stage) for i in members]
        orders.append(order)
    return orders


class _Next:
    """Gives the actions of one stage, each kind by microbatch, while there are any."""

    def __init__(self, stage: int, microbatches: int):
        self._stage = stage
        self._microbatches = microbatches
        self._given = dict.fromkeys((FORWARD, INPUT, WEIGHT), 0)

    def has(self, kind: str) -> bool:
        """Whether there is one more action of this kind; a backward follows its own forward."""
        before = {FORWARD: None, INPUT: FORWARD, WEIGHT: INPUT}[kind]
        ready = self._microbatches if before is None else self._given[before]
        return self._given[kind] < ready

    def next(self, *kinds: str) -> Iterator[Action]:
        """The next action of each kind, of those that there are."""
        for kind in kinds:
            if self.has(kind):
                yield Action(kind, self._given[kind], self._stage)
                self._given[kind] += 1


def _even_groups(microbatches: int, size: int) -> list[range]:
    """Microbatches in groups of `size` or, where it does not divide them, a little more; fewer only
    where there are fewer."""
    count = max(1, microbatches // size)
    groups = []
    start = 0
    for i in range(count):
        stop = start + microbatches // count + int(i < microbatches % count)
        groups.append(range(start, stop))
        start = stop
    return groups


def _alternate(forwards: list[Action], backwards: list[Action], warmup: int) -> list[Action]:
    """`warmup` forwards, then a forward and a backward in turn, then the backwards that are
    left."""
    order = forwards[:warmup]
    steady = forwards[warmup:]
    for forward, backward in zip(steady, backwards):
        order += [forward, backward]
    return order + backwards[len(steady) :]


@dataclass(frozen=True)
class Schedule:
    """A schedule, and what it asks of a pipeline."""

    orders: Callable[..., Orders]
    """Called with a Pipeline and the number of microbatches."""
    chunks: range = range(1, 2)
    """Numbers of stages on a rank that it is made for."""
    v_shaped: bool = False
    """As `Pipeline.v_shaped`."""
    splits_backward: bool = False
    """Whether weight gradients are computed apart from the rest of a backward."""


SCHEDULES = {
    "1f1b": Schedule(one_forward_one_backward),
    "gpipe": Schedule(gpipe, chunks=range(1, 1025)),
    "interleaved": Schedule(interleaved, chunks=range(2, 1025)),
    "zb-h1": Schedule(zb_h1, splits_backward=True),
    "zb-v": Schedule(zb_v, chunks=range(2, 3), v_shaped=True, splits_backward=True),
}
"""By the names of --pipeline-schedule."""


def pipeline_of(config: ParallelConfig) -> Pipeline:
    """The pipeline of a configuration; with `auto`, which is still to choose, that of 1F1B."""
    schedule = SCHEDULES.get(config.schedule, SCHEDULES["1f1b"])
    chunks = config.num_virtual_stages_per_pipeline_rank or schedule.chunks.start
    return Pipeline(config.pipeline_model_parallel_size, chunks, schedule.v_shaped)


@lru_cache(maxsize=8)
def training_orders(config: ParallelConfig, microbatches: int) -> Orders:
    """The orders of a training step of a configuration. Do not change them."""
    orders = SCHEDULES[config.schedule].orders
    group = config.microbatch_group_size_per_virtual_pipeline_stage
    if orders is interleaved:
        return interleaved(pipeline_of(config), microbatches, group)
    return orders(pipeline_of(config), microbatches)


def peak_in_flight(order: Sequence[Action]) -> dict[int, int]:
    """How many microbatches each stage of a rank holds activations of, at the moment at which the
    rank holds most: those whose forward has run and whose backward has not, weight gradients
    included."""
    ends = WEIGHT if any(action.kind == WEIGHT for action in order) else BACKWARD
    held = {action.stage: 0 for action in order}
    fullest = dict(held)
    for action in order:
        if action.kind == FORWARD:
            held[action.stage] += 1
        elif action.kind == ends:
            held[action.stage] -= 1
        if sum(held.values()) > sum(fullest.values()):
            fullest = dict(held)
    return fullest
