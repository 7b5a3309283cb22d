"""Who is to blame when ranks hang or die: a pure function of what they last reported. Imports no torch."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

from megalite.parallel.activity import Activity, Call

STACK_LINES = 30
"""Of the culprit's Python stack, the innermost lines shown on the console."""
CULPRITS_SHOWN = 3
"""Culprits whose stack is on the console; all are in the file."""


@dataclass(frozen=True)
class Report:
    """What a rank says about itself."""

    rank: int
    host: str
    pid: int
    step: int
    doing: str
    idle_seconds: float
    """Since its last progress; 0 where it may take its time."""
    latest: list[Call]
    """The latest call that it has begun of each group, and with each rank it exchanges transfers with."""
    waiting: Call | None = None
    """The call it is in."""
    blocks: bool = True
    """Whether a rank that waits shows it in `waiting` (gloo); else it waits on its GPU, and `latest` alone tells."""
    stack: str = ""
    """Python stack of the main thread, innermost call last."""
    threads: str = ""
    """Stacks of all threads."""
    silent_seconds: float = 0.0
    """For how long nothing has been heard of the rank."""
    beat: int = 0
    """How many reports came before; one that does not grow is of a rank that no longer reports."""

    @classmethod
    def of(
        cls, activity: Activity, rank: int, host: str, pid: int, blocks: bool, **rest
    ) -> "Report":
        """The report of a rank from its activity."""
        return cls(
            rank,
            host,
            pid,
            activity.step,
            activity.doing,
            activity.idle_seconds,
            list(activity.latest.values()),
            activity.waiting,
            blocks,
            **rest,
        )

    def to_json(self) -> str:
        """The report as text. Groups are named by first rank, end and stride, so that its size is not the job's."""
        return json.dumps(
            asdict(self), default=lambda ranks: f"{ranks.start}:{ranks.stop}:{ranks.step}"
        )

    @classmethod
    def from_json(cls, text: str | bytes) -> "Report":
        """Back from `to_json`."""
        values = json.loads(text)
        waiting = values["waiting"] and _call(values["waiting"])
        return cls(
            **values | {"waiting": waiting, "latest": [_call(call) for call in values["latest"]]}
        )

    @property
    def where(self) -> str:
        """`rank 3 on node2 (process 4711)`."""
        return f"rank {self.rank} on {self.host} (process {self.pid})"

    @property
    def state(self) -> str:
        """What it is in the middle of."""
        at = f"{self.doing}, step {self.step}" if self.step else self.doing
        return f"{at}; in {self.waiting}" if self.waiting else f"{at}; in no call"

    @property
    def awaits(self) -> list[Call]:
        """The calls that it may wait in for other ranks."""
        return [self.waiting] if self.waiting else ([] if self.blocks else self.latest)


def _call(values: dict) -> Call:
    ranks = values["ranks"]
    ranks = range(*map(int, ranks.split(":"))) if isinstance(ranks, str) else tuple(ranks)
    return Call(**values | {"ranks": ranks, "shape": tuple(values["shape"])})


Why = tuple[Call | None, int | None]
"""The call that a rank is missing from, and one of the ranks that wait there."""


def culprits(reports: Mapping[int, Report], silent_after: float) -> tuple[dict[int, Why], bool]:
    """Ranks that others wait for and that wait for nobody themselves; and whether, without any, these are a circle of
    ranks that wait for each other.

    Where nobody waits for anyone: those of which nothing is heard, else those that stand still outside of calls.
    """
    begun = {
        rank: {call.key: call.number for call in report.latest} for rank, report in reports.items()
    }
    missing: dict[tuple, list[int]] = {}
    wanted: dict[int, Why] = {}
    waits = set()
    # The one that waits longest names the call, since it was there first. Who is missing is found once for all that
    # wait in one call: thousands may.
    for rank in sorted(reports, key=lambda rank: -reports[rank].idle_seconds):
        for call in reports[rank].awaits:
            place = call.key, call.number
            if place not in missing:
                missing[place] = [
                    r for r in call.ranks if r in begun and begun[r].get(call.key, 0) < call.number
                ]
                wanted |= {other: (call, rank) for other in missing[place] if other not in wanted}
            if missing[place]:
                waits.add(rank)
    silent = {rank for rank, report in reports.items() if report.silent_seconds > silent_after}
    roots = {rank: why for rank, why in wanted.items() if rank in silent or rank not in waits}
    if wanted and not roots and not all(report.blocks for report in reports.values()):
        # On GPUs a rank may have sent what the other has not come to receive: the first that stood still is to blame.
        roots = dict([max(wanted.items(), key=lambda item: reports[item[0]].idle_seconds)])
    if wanted:
        return dict(sorted((roots or wanted).items())), not roots
    still = (
        silent
        or {rank for rank, r in reports.items() if r.idle_seconds and not r.waiting}
        or set(reports)
    )
    return dict.fromkeys(sorted(still), (None, None)), False


def hang_verdict(
    reports: Mapping[int, Report], seconds: float, silent_after: float, file: str
) -> str:
    """What is printed when nothing has moved for `seconds`: who, where, missing from what, with its stack."""
    blamed, circle = culprits(reports, silent_after)
    names = ", ".join(map(str, list(blamed)[:16])) + (", ..." if len(blamed) > 16 else "")
    count = f"rank {names}" if len(blamed) == 1 else f"ranks {names}"
    head = f"{count} wait for each other" if circle else f"waiting for {count}"
    lines = [f"HANG: no progress for {seconds:.0f} s, {head}"]
    for rank, (call, waiting) in list(blamed.items())[:CULPRITS_SHOWN]:
        lines += _blame(
            reports[rank], call, reports.get(waiting), reports[rank].silent_seconds > silent_after
        )
    others = len(reports) - len(blamed)
    lines.append(
        f"  stacks of all {len(reports)} ranks: {file}"
        + (f" ({others} only wait)" if others else "")
    )
    return "\n".join(lines)


def _blame(report: Report, call: Call | None, waiting: Report | None, silent: bool) -> list[str]:
    lines = [f"  {report.where}: {'last heard: ' if silent else ''}{report.state}"]
    if silent:
        lines.append(
            "    it does not answer: stopped, cut off from the network, or stuck outside of Python"
        )
    if call is not None:
        lines.append(f"    missing from {call}")
        long = f" has waited for {waiting.idle_seconds:.0f} s" if waiting.idle_seconds else " waits"
        lines.append(f"    where {waiting.where}{long}")
    if report.stack:
        stack = report.stack.rstrip().splitlines()[-STACK_LINES:]
        lines += ["    its Python stack, innermost call last:", *(f"    {line}" for line in stack)]
    return lines


def all_stacks(verdict: str, reports: Mapping[int, Report]) -> Iterator[str]:
    """The contents of the file, in parts: the verdict, then every rank with the stacks of all its threads."""
    yield f"{verdict}\n"
    for _, report in sorted(reports.items()):
        yield f"\n--- {report.where}: {report.state}\n{report.threads.rstrip() or 'it does not answer'}\n"
