"""Who is to blame when ranks hang or die: a pure function of what they last reported. Imports no torch."""

import json
from collections.abc import Mapping
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
    def of(cls, activity: Activity, rank: int, host: str, pid: int, blocks: bool, **rest) -> "Report":
        """The report of a rank from its activity."""
        return cls(
            rank, host, pid, activity.step, activity.doing, activity.idle_seconds,
            list(activity.latest.values()), activity.waiting, blocks, **rest,
        )  # fmt: skip

    def to_json(self) -> str:
        """The report as text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> "Report":
        """Back from `to_json`."""
        values = json.loads(text)
        waiting = values["waiting"] and _call(values["waiting"])
        return cls(**values | {"waiting": waiting, "latest": [_call(call) for call in values["latest"]]})

    @property
    def where(self) -> str:
        """`rank 3 on node2 (process 4711)`."""
        return f"rank {self.rank} on {self.host} (process {self.pid})"

    @property
    def state(self) -> str:
        """What it is in the middle of."""
        at = f"{self.doing}, step {self.step}" if self.step else self.doing
        return f"{at}; in {self.waiting}" if self.waiting else f"{at}; in no call"

    def lacks(self, call: Call) -> bool:
        """Whether the rank should take part in a call that it has not begun."""
        begun = next((mine.number for mine in self.latest if mine.key == call.key), 0)
        return self.rank in call.ranks and begun < call.number


def _call(values: dict) -> Call:
    return Call(**values | {"ranks": tuple(values["ranks"]), "shape": tuple(values["shape"])})


def missed(reports: Mapping[int, Report], rank: int) -> dict[int, Call]:
    """The ranks that this one waits for, each with the call that it has not begun."""
    mine = reports[rank]
    calls = [mine.waiting] if mine.waiting else ([] if mine.blocks else mine.latest)
    return {other: call for call in calls for other in call.ranks if other in reports and reports[other].lacks(call)}


def culprits(reports: Mapping[int, Report], silent_after: float) -> dict[int, tuple[Call | None, int | None]]:
    """Ranks that others wait for and that wait for nobody themselves, each with the call that it is missing from and
    one of the ranks that wait there.

    Without any: all of a circle of ranks that wait for each other; or, where nobody waits for anyone, those of which
    nothing is heard, else those that stand still outside of calls.
    """
    waits = {rank: missed(reports, rank) for rank in reports}
    wanted: dict[int, tuple[Call | None, int | None]] = {}
    # The one that waits longest names the call, since it was there first.
    for rank in sorted(waits, key=lambda rank: -reports[rank].idle_seconds):
        for other, call in waits[rank].items():
            wanted.setdefault(other, (call, rank))
    silent = {rank for rank, report in reports.items() if report.silent_seconds > silent_after}
    roots = {rank: why for rank, why in wanted.items() if rank in silent or not waits[rank]}
    if wanted and not roots and not all(report.blocks for report in reports.values()):
        # On GPUs a rank may have sent what the other has not come to receive: the first that stood still is to blame.
        roots = dict([max(wanted.items(), key=lambda item: reports[item[0]].idle_seconds)])
    if roots or wanted:
        return dict(sorted((roots or wanted).items()))
    still = silent or {rank for rank, r in reports.items() if r.idle_seconds and not r.waiting} or set(reports)
    return dict.fromkeys(sorted(still), (None, None))


def hang_verdict(reports: Mapping[int, Report], seconds: float, silent_after: float, file: str) -> str:
    """What is printed when nothing has moved for `seconds`: who, where, missing from what, with its stack."""
    blamed = culprits(reports, silent_after)
    waits = {rank: missed(reports, rank) for rank in blamed}
    circle = len(blamed) > 1 and all(waits[rank] for rank in blamed)
    circle = circle and not any(reports[rank].silent_seconds > silent_after for rank in blamed)
    names = ", ".join(map(str, list(blamed)[:16])) + (", ..." if len(blamed) > 16 else "")
    count = f"rank {names}" if len(blamed) == 1 else f"ranks {names}"
    head = f"{count} wait for each other" if circle else f"waiting for {count}"
    lines = [f"HANG: no progress for {seconds:.0f} s, {head}"]
    for rank, (call, waiting) in list(blamed.items())[:CULPRITS_SHOWN]:
        lines += _blame(reports[rank], call, reports.get(waiting), reports[rank].silent_seconds > silent_after)
    others = len(reports) - len(blamed)
    lines.append(f"  stacks of all {len(reports)} ranks: {file}" + (f" ({others} only wait)" if others else ""))
    return "\n".join(lines)


def _blame(report: Report, call: Call | None, waiting: Report | None, silent: bool) -> list[str]:
    lines = [f"  {report.where}: {report.state}"]
    if silent:
        lines.append("    it does not answer: stopped, cut off from the network, or stuck outside of Python")
    if call is not None:
        lines.append(f"    missing from {call}")
        lines.append(f"    where {waiting.where} has waited for {waiting.idle_seconds:.0f} s")
    if report.stack:
        stack = report.stack.rstrip().splitlines()[-STACK_LINES:]
        lines += ["    its Python stack, innermost call last:", *(f"    {line}" for line in stack)]
    return lines


def all_stacks(verdict: str, reports: Mapping[int, Report]) -> str:
    """The contents of the file: the verdict, then every rank with the stacks of all its threads."""
    parts = [verdict]
    for report in (reports[rank] for rank in sorted(reports)):
        parts.append(f"--- {report.where}: {report.state}\n{report.threads or 'it does not answer'}".rstrip())
    return "\n\n".join(parts) + "\n"
