"""The watchdog: a thread of each rank that reports what the rank is doing, and ends the job when nothing moves.

Reports go through the rendezvous store, which works while every collective is stuck: gloo and NCCL wait without
Python's lock. Whoever first finds that it has not moved for the time allowed asks all for their stacks, judges, and
says so once for all. A rank that fails leaves its message in the store, so that those that lose contact with it can
say why.
"""

import faulthandler
import json
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from megalite.parallel.context import ParallelContext
from megalite.parallel.verdict import Report, all_stacks, hang_verdict

HUNG = 70
"""Exit status of every rank of a job that hung (EX_SOFTWARE of sysexits.h)."""
BEAT_SECONDS = 1.0
"""Between two reports of a rank."""
SILENT_BEATS = 4
"""A rank that misses so many reports is silent."""
ANSWER_SECONDS = 10.0
"""In which the store must answer."""
LINGER_SECONDS = 5.0
"""For which rank 0 keeps the store for the others when it failed."""
SUSPENDED_SECONDS = 5.0
"""A thread that wakes up so much too late was suspended, with its process."""
FAREWELL_SECONDS = 0.5
"""Ranks that follow another into its end leave it so long to speak first."""


Answer = TypeVar("Answer")


class LostContact(RuntimeError):
    """Other ranks are gone; the message says which one failed, and why. Empty where another rank says it."""


class Watchdog:
    """Watches over one rank while it is open. `timeout` seconds without progress are a hang; 0: there are no hangs.

    `folder` is where the file with all stacks is written; `say` prints the verdict.
    """

    def __init__(self, context: ParallelContext, timeout: float, folder: str | Path, say: Callable = print):
        self._context, self._timeout, self._folder, self._say = context, timeout, Path(folder), say
        self._store = context.store.clone()  # a connection of its own: another one may be blocked in a wait
        self._main = threading.get_ident()
        self._beats, self._seconds = 0, min(BEAT_SECONDS, timeout / 4) if timeout else BEAT_SECONDS
        self._over, self._leaving, self._failed = threading.Event(), threading.Event(), False
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, *unused: object) -> None:
        self._over.set()
        self._leaving.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    # What the thread does --------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        asleep, activity = time.monotonic(), self._context.activity
        while not self._over.wait(self._seconds):
            if self._timeout:  # should this thread never run again, since another one keeps Python's lock
                faulthandler.dump_traceback_later(self._timeout, file=sys.__stderr__)
            if time.monotonic() - asleep > self._seconds + SUSPENDED_SECONDS:
                activity.enters(activity.doing)  # the whole process was suspended: its time begins anew
            idle = activity.idle_seconds
            hangs = 0 < self._timeout < idle
            try:
                _ask(self._report)
                if hangs or _ask(lambda: self._store.add("hangs", 0)):
                    judge = hangs and _ask(lambda: self._store.add("hangs", 1)) == 1
                    self._end(judge)
                if _ask(lambda: self._store.add("failures", 0)) and not self._leaving.wait(LINGER_SECONDS / 2):
                    self._leave()
            except RuntimeError as error:  # of torch's store
                if hangs:
                    self._end_alone(idle, error)
            asleep = time.monotonic()

    def _leave(self) -> None:
        """Another rank has failed, and this one does not notice: it computes, or waits on its GPU or for rank 0, which
        keeps the store for us."""
        if told := self._agree_on_the_reason():
            self._say(f"rank {self._context.rank}: {told}")
        os._exit(1)

    def _report(self, **stacks: str) -> None:
        context = self._context
        blocks = context.device.type == "cpu"
        who = context.rank, context.host, os.getpid()
        report = Report.of(context.activity, *who, blocks, beat=self._beats, **stacks)
        self._store.set(f"report/{context.rank}", report.to_json())
        self._beats += 1

    def _end(self, judge: bool) -> None:
        """Leave the stacks of this rank; wait until one rank has judged; end the process."""
        self._report(stack=self._main_stack(), threads=_all_threads())
        patience = 2 + SILENT_BEATS * self._seconds
        if judge:
            reports = self._collect(lambda report: bool(report.threads), patience)
            self._tell(reports)
            self._store.set("judged", "yes")
        end = time.monotonic() + 2 * patience
        with suppress(RuntimeError):  # of torch's store, when its process has ended
            while not self._store.check(["judged"]) and time.monotonic() < end:
                time.sleep(0.05)
        if self._context.rank == 0:
            time.sleep(FAREWELL_SECONDS / 2)  # the store may live in this process
        os._exit(HUNG)

    def _tell(self, reports: dict[int, Report]) -> None:
        idle = max(report.idle_seconds for report in reports.values())
        step = max(report.step for report in reports.values())
        file = self._folder / f"hang-step-{step}.txt"
        verdict = hang_verdict(reports, idle, SILENT_BEATS * self._seconds, str(file))
        self._say(verdict)  # before the file: its disk may be what hangs
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            file.write_text(all_stacks(verdict, reports))
        except OSError as error:
            self._say(f"  ({file} is not written: {error})")

    def _end_alone(self, idle: float, error: Exception) -> None:
        """The store does not answer either, so rank 0 or its node is stopped, dead or cut off."""
        context = self._context
        where = f"on rank {context.rank} of {context.host}, in {context.activity.waiting or 'no call'}"
        reason = str(error).splitlines()[0]
        self._say(
            f"HANG: no progress for {idle:.0f} s {where}, and the process that ranks meet in (rank 0, or torchrun on "
            f"the first node) does not answer: {reason}\n{self._main_stack()}"
        )
        os._exit(HUNG)

    def _main_stack(self) -> str:
        frame = sys._current_frames().get(self._main)
        return "".join(traceback.format_stack(frame)) if frame is not None else ""

    # What others want to know ----------------------------------------------------------------------------------------

    def _collect(self, complete: Callable[[Report], bool], patience: float) -> dict[int, Report]:
        """The reports of all ranks, once each is complete or `patience` seconds are over."""
        began, wanted, found = time.monotonic(), set(range(self._context.world_size)), {}
        while wanted and time.monotonic() < began + patience:
            for rank in sorted(wanted):
                if self._store.check([f"report/{rank}"]):
                    found[rank] = Report.from_json(self._store.get(f"report/{rank}"))
            wanted = {rank for rank in wanted if rank not in found or not complete(found[rank])}
            time.sleep(0.05 if wanted else 0)
        waited = time.monotonic() - began
        unknown = Report(-1, "a host unknown", 0, 0, "starting", 0.0, [])
        lost = {rank: replace(found.get(rank, unknown), rank=rank, silent_seconds=waited) for rank in wanted}
        return found | lost

    def failed(self, message: str) -> None:
        """Leave word of why this rank ends, before its connections break."""
        self._failed = True
        self._leaving.set()
        with suppress(RuntimeError):  # of torch's store: the job ends anyway
            number = _ask(lambda: self._store.add("failures", 1))
            text = json.dumps([self._context.rank, self._context.host, message or "see what rank 0 says"])
            _ask(lambda: self._store.set(f"failure/{number}", text))

    def linger(self) -> None:
        """Rank 0's process may hold the store: when it failed, it stays until another rank has read why, or all others
        have failed too, or some seconds are over. To be called when the groups are gone."""
        size = self._context.world_size
        if self._failed and self._context.rank == 0 and size > 1:
            end = time.monotonic() + LINGER_SECONDS
            with suppress(RuntimeError):  # of torch's store
                while not self._store.check(["spoken"]) and time.monotonic() < end:
                    if self._store.add("failures", 0) == size:
                        return
                    time.sleep(0.05)
            time.sleep(FAREWELL_SECONDS)

    def why_contact_was_lost(self) -> str:
        """Which rank failed or died, in words, on the first rank that asks; "" on the others. Takes a few seconds."""
        self._leaving.set()
        # A launcher sends SIGTERM to all as soon as one has died: that must not cut off the explanation.
        before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            return _ask(self._agree_on_the_reason, 3 * ANSWER_SECONDS)
        except RuntimeError:  # of torch's store
            return "rank 0, or torchrun on the first node, is gone: see what it says; without a word, it was killed"
        finally:
            signal.signal(signal.SIGTERM, before)

    def _agree_on_the_reason(self) -> str:
        told, end = "", time.monotonic() + 2 * ANSWER_SECONDS
        if self._store.add("speakers", 1) == 1:
            told = self._reason()
            time.sleep(FAREWELL_SECONDS)
            self._store.set("spoken", "yes")
        while not self._store.check(["spoken"]) and time.monotonic() < end:
            time.sleep(0.05)
        if self._context.rank == 0:
            time.sleep(FAREWELL_SECONDS)  # the store may live in this process
        return told

    def _reason(self) -> str:
        time.sleep(FAREWELL_SECONDS)
        if not self._store.add("failures", 0):
            before = self._collect(lambda report: True, 0.5)
            dead = self._collect(lambda report: report.beat > before[report.rank].beat, SILENT_BEATS * BEAT_SECONDS)
            gone = [report for report in dead.values() if report.silent_seconds]
            if gone:
                names = "; ".join(
                    f"{report.where} died without a word (last heard: {report.state})" for report in gone[:3]
                )
                return f"{names}: killed by hand, for want of memory, or with its node (see dmesg and `sacct -j JOB`)"
        if not self._store.add("failures", 0):
            return ""
        who, host, message = json.loads(self._store.get("failure/1"))
        return f"rank {who} on {host} failed: {message}"


def _ask(action: Callable[[], Answer], seconds: float = ANSWER_SECONDS) -> Answer:
    """Do something with the store, on a thread, since the store of a stopped process does not answer at all.

    Raises RuntimeError, as the store does, when it takes longer.
    """
    answers: list[Answer | RuntimeError] = []

    def act() -> None:
        try:
            answers.append(action())
        except RuntimeError as error:
            answers.append(error)

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(seconds)
    answer = answers[0] if answers else RuntimeError(f"no answer within {seconds:.0f} s")
    if isinstance(answer, RuntimeError):
        raise answer
    return answer


def _all_threads() -> str:
    """The stack of every Python thread of this process, as faulthandler writes it."""
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read().decode(errors="replace")
