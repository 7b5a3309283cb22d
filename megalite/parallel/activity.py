"""What this rank is doing, for the watchdog, and how long, for the metrics. No torch."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

UNTIMED_STATES = ("starting", "saving")
"""States without a hang timeout, since disks may be slow. No other rank waits for a rank in one of
them, except in a call that may take long."""
RANKS_SHOWN = 8
"""Ranks of a group that a message lists."""


@dataclass(frozen=True)
class Call:
    """A collective, or a transfer between two ranks, as one of its ranks sees it."""

    kind: str
    """all_reduce, transfer, ..."""
    group: str
    """Name of the group: tensor, data, pipeline, ..."""
    ranks: Sequence[int]
    """Global ranks that must all take part, a range or a tuple; of a transfer (from, to)."""
    number: int
    """Sequence number within its group (of a transfer: between its two ranks), from 1."""
    shape: tuple[int, ...] = ()
    """Of this rank's input."""
    dtype: str = ""
    bytes: int = 0
    """Of the whole tensor: of all shards together in a gather or a reduce-scatter."""
    untimed: bool = False
    """Whether it may take longer than --hang-timeout."""

    @property
    def key(self) -> tuple:
        """What sequence numbers are counted by; the same on every rank of the call."""
        return call_key(self.kind, self.group, self.ranks)

    def __str__(self) -> str:
        content = f" of {list(self.shape)} {self.dtype}" if self.dtype else ""
        if self.kind == "transfer":
            source, target = self.ranks
            return f"transfer {self.number} from rank {source} to rank {target}{content}"
        shown = first_ranks(self.ranks, RANKS_SHOWN)
        return f"{self.kind}{content}, call {self.number} of the {self.group} group (ranks {shown})"


class Span(NamedTuple):
    """What a rank did from one moment to another, for a trace."""

    phase: str
    """data, forward, backward, communication or optimizer."""
    what: Any
    """The Call of a communication. Otherwise the action that the rank ran, or None."""
    began: Any
    """As `Activity.now` gives it."""
    ended: Any


@dataclass
class Traffic:
    """The calls of one kind in one group, as one rank sees them."""

    calls: int = 0
    bytes: int = 0
    """Of the whole tensors of its collectives, as in `Call`, and of what it sent or received."""
    seconds: float = 0.0
    """That this rank was in the calls, or waited for them. What overlaps with computation does not
    count."""


def first_ranks(ranks: Sequence[int], most: int) -> str:
    """`0, 1, 2, ...`: the first `most` ranks, for a message."""
    shown = ", ".join(map(str, ranks[:most]))
    return f"{shown}, ..." if len(ranks) > most else shown


def call_key(kind: str, group: str, ranks: Sequence[int]) -> tuple:
    """Transfers are counted separately from the collectives of a group."""
    return group, ranks, kind == "transfer"


class Activity:
    """The latest calls a rank has begun, the one it waits in, and the seconds spent in each phase.

    Phases exclude each other: communication within a forward counts as communication only. On a GPU
    their times are meaningful only while `synchronize` is set, since the host runs ahead of it.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self.step = 0
        self.state = "starting"
        """starting, training, evaluating, saving or ending."""
        self.latest: dict[tuple, Call] = {}
        """The latest call under each key."""
        self.waiting: Call | None = None
        """The call that the rank is in."""
        self.action: Any = None
        """The computation of the pipeline's schedule that the rank runs, or waits to run."""
        self.name_of: Callable[[Any], str] = str
        """Words for an action."""
        self.synchronize: Callable[[], None] | None = None
        """Waits for the device, so that a phase's time includes its work there."""
        self.traffic: dict[tuple[str, str], Traffic] | None = None
        """By group and kind of call; None: not counted."""
        self.spans: list[Span] | None = None
        """Every phase and every call, in the order in which they end; None: not noted. Set it
        between phases."""
        self.now: Callable[[], Any] = clock
        """Marks a moment in `spans`."""
        self._phase = ""
        self._seconds = defaultdict(float)
        self._phase_began = self._changed = clock()

    def set_state(self, state: str, step: int | None = None) -> None:
        """Enter a state; with `step`, also a step of the training."""
        self.state = state
        self.action = None
        if step is not None:
            self.step = step
        self._changed = self._clock()

    def record(self, kind: str, group: str, ranks: Sequence[int], **content) -> Call:
        """Record a collective or transfer that is about to be posted; gives it its number.

        content: `shape`, `dtype`, `bytes` and `untimed` of the Call.
        """
        key = call_key(kind, group, ranks)
        number = 1
        if key in self.latest:
            number += self.latest[key].number
        call = self.latest[key] = Call(kind, group, ranks, number, **content)
        if self.traffic is not None:
            counted = self.traffic[group, kind]
            counted.calls += 1
            counted.bytes += call.bytes
        return call

    @contextmanager
    def waits(self, call: Call) -> Iterator[Call]:
        """While the block runs, the rank is in this call."""
        before = self.waiting
        phase = self._switch("communication")
        began = self._phase_began
        spans = self.spans
        marked = self.now() if spans is not None else None
        self.waiting = call
        try:
            yield call
        finally:
            if spans is not None:
                spans.append(Span("communication", call, marked, self.now()))
            self.waiting = before
            self._switch(phase)
            if self.traffic is not None:
                self.traffic[call.group, call.kind].seconds += self._phase_began - began

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """While the block runs, time counts as this phase's."""
        before = self._switch(phase)
        spans = self.spans
        began = self.now() if spans is not None else None
        try:
            yield
        finally:
            if spans is not None:
                spans.append(Span(phase, self.action, began, self.now()))
            self._switch(before)

    def _switch(self, phase: str) -> str:
        if self.synchronize is not None:
            self.synchronize()
        now = self._changed = self._clock()
        self._seconds[self._phase] += now - self._phase_began
        before = self._phase
        self._phase = phase
        self._phase_began = now
        return before

    def count_traffic(self) -> None:
        """From here on count calls, bytes and seconds."""
        self.traffic = defaultdict(Traffic)

    def take_traffic(self) -> dict[tuple[str, str], Traffic]:
        """What was counted by (group, kind), if anything; end counting."""
        taken = dict(self.traffic or {})
        self.traffic = None
        return taken

    def take_seconds(self) -> dict[str, float]:
        """Seconds of each phase since this was last called; time of no phase is left out."""
        self._switch(self._phase)
        taken = dict(self._seconds)
        self._seconds.clear()
        taken.pop("", None)
        return taken

    @property
    def action_name(self) -> str:
        """The action in words; "" where there is none."""
        action = self.action
        return "" if action is None else self.name_of(action)

    @property
    def idle_seconds(self) -> float:
        """Seconds since the last progress; 0 in a state or a call without a hang timeout."""
        waiting = self.waiting
        untimed = self.state in UNTIMED_STATES if waiting is None else waiting.untimed
        return 0.0 if untimed else self._clock() - self._changed
