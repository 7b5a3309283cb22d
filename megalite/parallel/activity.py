"""What this rank is doing, for the watchdog, and how its time was spent, for the metrics. Imports no torch."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

PATIENT = ("starting", "saving")
"""What may take any time, since disks do: no other rank waits for it in an impatient collective."""


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
    """The how-manieth call of the group, or transfer from one to the other, this is; from 1."""
    shape: tuple[int, ...] = ()
    dtype: str = ""
    patient: bool = False
    """Whether it may take longer than --hang-timeout."""

    @property
    def key(self) -> tuple:
        """What calls are counted by: every rank of a call counts it under the same key."""
        return call_key(self.kind, self.group, self.ranks)

    def __str__(self) -> str:
        content = f" of {list(self.shape)} {self.dtype}" if self.dtype else ""
        if self.kind == "transfer":
            return (
                f"transfer {self.number} from rank {self.ranks[0]} to rank {self.ranks[1]}{content}"
            )
        shown = ", ".join(map(str, self.ranks[:8])) + (", ..." if len(self.ranks) > 8 else "")
        return f"{self.kind}{content}, call {self.number} of the {self.group} group (ranks {shown})"


def call_key(kind: str, group: str, ranks: Sequence[int]) -> tuple:
    """Transfers are counted apart from the collectives of a group."""
    return group, ranks, kind == "transfer"


class Activity:
    """The latest calls that a rank has begun, the one it waits in, and the seconds it spent in each phase of its work.

    Phases exclude each other: what a forward spends in communication counts as communication alone. On a GPU they tell
    something only while `synchronize` is set, since the host runs ahead.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self.step, self.doing = 0, "starting"
        self.latest: dict[tuple, Call] = {}
        """The latest call under each key."""
        self.waiting: Call | None = None
        """The call that the rank is in."""
        self.synchronize: Callable[[], None] | None = None
        """Waits for the device, where a phase's time is to be its own."""
        self._phase, self._seconds = "", defaultdict(float)
        self._phase_began = self._changed = clock()

    def set_state(self, doing: str, step: int | None = None) -> None:
        """From here on the rank is "starting", "training", "evaluating" or "saving"."""
        self.doing, self.step = doing, self.step if step is None else step
        self._changed = self._clock()

    def record(
        self,
        kind: str,
        group: str,
        ranks: Sequence[int],
        shape: tuple = (),
        dtype: str = "",
        patient: bool = False,
    ) -> Call:
        """Note a collective or a transfer that is about to be posted."""
        key = call_key(kind, group, ranks)
        number = self.latest[key].number + 1 if key in self.latest else 1
        call = self.latest[key] = Call(kind, group, ranks, number, shape, dtype, patient)
        return call

    @contextmanager
    def waits(self, call: Call) -> Iterator[Call]:
        """While the block runs, the rank is in this call."""
        before, phase = self.waiting, self._switch("communication")
        self.waiting = call
        try:
            yield call
        finally:
            self.waiting = before
            self._switch(phase)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """While the block runs, time counts as this phase's."""
        before = self._switch(phase)
        try:
            yield
        finally:
            self._switch(before)

    def _switch(self, phase: str) -> str:
        if self.synchronize is not None:
            self.synchronize()
        now = self._changed = self._clock()
        self._seconds[self._phase] += now - self._phase_began
        before, self._phase, self._phase_began = self._phase, phase, now
        return before

    def take_seconds(self) -> dict[str, float]:
        """Seconds of each phase since the last time; what belongs to none is left out."""
        self._switch(self._phase)
        taken, self._seconds = dict(self._seconds), defaultdict(float)
        return {phase: seconds for phase, seconds in taken.items() if phase}

    @property
    def idle_seconds(self) -> float:
        """For how long nothing has changed, where something should; 0 while the rank may take its time."""
        waiting = self.waiting
        patient = waiting.patient if waiting is not None else self.doing in PATIENT
        return 0.0 if patient else self._clock() - self._changed
