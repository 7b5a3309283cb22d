"""Which ranks a hang is due to: a pure function of the last reports of all ranks. Imports no torch.

A rank blocks others if they wait for it in a call that it has not begun, and it waits for nobody.
The verdict is the text that names these ranks, the calls they are missing from, and their stacks.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import NamedTuple

from megalite.parallel.activity import Activity, Call, first_ranks

STACK_LINES = 30
"""Innermost lines of a blocking rank's Python stack that are printed."""
STACKS_SHOWN = 3
"""Blocking ranks whose stack is printed; the file has all stacks."""
RANKS_SHOWN = 16
"""Blocking ranks that the first line lists."""


@dataclass(frozen=True)
class Report:
    """What a rank reports about itself."""

    rank: int
    host: str
    pid: int
    step: int
    state: str
    idle_seconds: float
    """Since its last progress; 0 in a state or a call without a hang timeout."""
    latest: list[Call]
    """The latest call it has begun in each group, and the latest transfer with each rank."""
    waiting: Call | None = None
    """The call it is in."""
    action: str = ""
    """The computation of the schedule that it is at, in words: `forward of microbatch 5`."""
    blocks: bool = True
    """Whether a waiting rank shows its call in `waiting` (gloo). Otherwise it waits on its GPU
    (NCCL), and only `latest` says in which calls."""
    stack: str = ""
    """Python stack of the main thread, innermost call last."""
    threads: str = ""
    """Stacks of all threads."""
    silent_seconds: float = 0.0
    """Time since the last report of this rank was received."""
    beat: int = 0
    """Number of earlier reports; it stops growing when a rank no longer reports."""

    @classmethod
    def of(cls, activity: Activity, **rest) -> "Report":
        """The report of a rank from its activity; `rest` gives the other fields, or replaces some
        of the activity's."""
        now = {"step": activity.step, "state": activity.state, "waiting": activity.waiting}
        now |= {"idle_seconds": activity.idle_seconds, "latest": list(activity.latest.values())}
        now["action"] = activity.action_name
        return cls(**now | rest)

    def to_json(self) -> str:
        """The report as text. Ranges stay ranges: its size does not grow with the job."""
        return json.dumps(asdict(self), default=lambda r: f"{r.start}:{r.stop}:{r.step}")

    @classmethod
    def from_json(cls, text: str | bytes) -> "Report":
        """The report that `to_json` wrote."""
        values = json.loads(text)
        values["latest"] = list(map(_call_from_json, values["latest"]))
        if values["waiting"]:
            values["waiting"] = _call_from_json(values["waiting"])
        return cls(**values)

    @property
    def where(self) -> str:
        """`rank 3 on node2 (process 4711)`."""
        return f"rank {self.rank} on {self.host} (process {self.pid})"

    @property
    def doing(self) -> str:
        """`training, step 3, forward of microbatch 5; in all_reduce of ...`."""
        words = self.state
        if self.step:
            words += f", step {self.step}"
        if self.action:
            words += f", {self.action}"
        return f"{words}; in {self.waiting or 'no call'}"

    @property
    def awaits(self) -> list[Call]:
        """The calls in which it may wait for other ranks."""
        if self.waiting:
            return [self.waiting]
        return [] if self.blocks else self.latest


def _call_from_json(values: dict) -> Call:
    ranks = values["ranks"]
    ranks = range(*map(int, ranks.split(":"))) if isinstance(ranks, str) else tuple(ranks)
    return Call(**values | {"ranks": ranks, "shape": tuple(values["shape"])})


class Missing(NamedTuple):
    """How a rank blocks others; both None when nobody waits for it."""

    call: Call | None = None
    """The call that it has not begun."""
    waiting: int | None = None
    """A rank that waits there."""


Reports = Mapping[int, Report]
"""The last report of each rank."""


def blocking_ranks(reports: Reports, silent_after: float) -> tuple[dict[int, Missing], bool]:
    """(blocking ranks, whether they form a cycle): others wait for them, they wait for nobody.

    A rank of which nothing was heard for `silent_after` seconds blocks, whatever it was in last. If
    all that are waited for wait themselves, the result is this cycle. If no rank waits for another,
    it is the silent ranks, or else those that make no progress outside of calls.
    """
    # The sequence number of the latest call that each rank has begun, by key.
    begun = {}
    for rank, report in reports.items():
        begun[rank] = {call.key: call.number for call in report.latest}

    # Who has not begun the calls that others wait in. The rank that has waited longest comes first:
    # it names the call. Each call is looked at once, though thousands of ranks may wait in it.
    missing: dict[tuple, list[int]] = {}
    wanted: dict[int, Missing] = {}
    waits = set()
    for rank in sorted(reports, key=lambda rank: -reports[rank].idle_seconds):
        for call in reports[rank].awaits:
            site = (call.key, call.number)
            if site not in missing:
                missing[site] = []
                for other in call.ranks:
                    if other in begun and begun[other].get(call.key, 0) < call.number:
                        missing[site].append(other)
                        wanted.setdefault(other, Missing(call, rank))
            if missing[site]:
                waits.add(rank)

    # Those that are waited for and wait for nobody, or can no longer say so.
    silent = [rank for rank, report in reports.items() if report.silent_seconds > silent_after]
    roots = {}
    for rank, how in wanted.items():
        if rank in silent or rank not in waits:
            roots[rank] = how

    # On GPUs a rank may have sent what the other has not come to receive, and so seem to wait: then
    # the rank that has been idle longest is the cause.
    if wanted and not roots and not all(report.blocks for report in reports.values()):
        longest = max(wanted, key=lambda rank: reports[rank].idle_seconds)
        roots[longest] = wanted[longest]
    if wanted:
        return dict(sorted((roots or wanted).items())), not roots

    # Nobody waits for anyone.
    idle = [rank for rank, r in reports.items() if r.idle_seconds and not r.waiting]
    return dict.fromkeys(sorted(silent or idle or reports), Missing()), False


def hang_verdict(reports: Reports, seconds: float, silent_after: float, file: str) -> str:
    """What is printed after `seconds` without progress: which ranks, where, and their stacks.

    file: where the stacks of all ranks are written.
    """
    blocking, cycle = blocking_ranks(reports, silent_after)
    names = first_ranks(list(blocking), RANKS_SHOWN)
    subject = f"rank {names}" if len(blocking) == 1 else f"ranks {names}"
    head = f"{subject} wait for each other" if cycle else f"waiting for {subject}"
    lines = [f"HANG: no progress for {seconds:.0f} s, {head}"]
    for rank, how in list(blocking.items())[:STACKS_SHOWN]:
        silent = reports[rank].silent_seconds > silent_after
        lines += _describe(reports[rank], how.call, reports.get(how.waiting), silent=silent)
    last = f"  stacks of all {len(reports)} ranks: {file}"
    others = len(reports) - len(blocking)
    if others:
        last += f" ({others} only wait)"
    return "\n".join([*lines, last])


def _describe(report: Report, call: Call | None, waiting: Report | None, silent: bool) -> list[str]:
    """Lines about a blocking rank: its state, the call it is missing from, its stack."""
    if silent:
        lines = [
            f"  {report.where}: last heard: {report.doing}",
            "    it does not answer: stopped, cut off from the network, or stuck outside of Python",
        ]
    else:
        lines = [f"  {report.where}: {report.doing}"]
    if call is not None:
        time = f"has waited for {waiting.idle_seconds:.0f} s" if waiting.idle_seconds else "waits"
        lines.append(f"    missing from {call}")
        purpose = f" in its {waiting.action}" if waiting.action else ""
        lines.append(f"    where {waiting.where} {time}{purpose}")
    if report.stack:
        lines.append("    its Python stack, innermost call last:")
        for line in report.stack.rstrip().splitlines()[-STACK_LINES:]:
            lines.append(f"    {line}")
    return lines


def all_stacks(verdict: str, reports: Reports) -> Iterator[str]:
    """The contents of the file, in chunks: the verdict, then all threads' stacks of each rank."""
    yield f"{verdict}\n"
    for _, report in sorted(reports.items()):
        stacks = report.threads.rstrip() or "it does not answer"
        yield f"\n--- {report.where}: {report.doing}\n{stacks}\n"
