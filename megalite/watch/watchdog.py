"""The watchdog: a thread of each rank that reports what the rank is doing, and ends the job when nothing moves.

Reports go through the rendezvous store, which works while every collective is stuck: gloo and NCCL wait without
Python's lock. Whoever first finds that it has not moved for the time allowed asks all for their stacks, judges, and
says so once for all. A rank that fails leaves its message in the store, so that those that lose contact with it can
say why.
"""

import atexit
import faulthandler
import json
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from megalite.parallel.context import ParallelContext
from megalite.watch.bounded import ANSWER_SECONDS, BoundedStore, SuspendDetector
from megalite.watch.verdict import Report, all_stacks, hang_verdict

HUNG = 70
"""Exit status of every rank of a job that hung (EX_SOFTWARE of sysexits.h)."""
BEAT_SECONDS = 1.0
"""Between two reports of a rank."""
SILENT_BEATS = 4
"""A rank that misses so many reports is silent."""
SILENT_SECONDS = 15.0
"""A rank that is silent for so long, and --hang-timeout, is gone even where it may take its time: a report takes none,
and another thread keeps Python's lock for seconds at the most."""
POLL_SECONDS = 0.2
"""Between two looks at what another rank is to leave in the store: a thousand ranks may look."""
LINGER_SECONDS = 5.0
"""For which rank 0 keeps the store, at most, for others that do not know yet why the job ends."""
OTHERS_FIRST_SECONDS = 0.5
"""Ranks that follow another into its end let it speak first, so long: a launcher ends all when one has ended."""


class LostContact(RuntimeError):
    """Other ranks are gone; the message says which one failed, and why. Empty where another rank says it."""


class Watchdog:
    """Watches over one rank while it is open. `timeout` seconds without progress are a hang; 0: there are no hangs.

    `folder` is where the file with all stacks is written; `say` prints the verdict.
    """

    def __init__(
        self, context: ParallelContext, timeout: float, folder: str | Path, say: Callable = print
    ):
        self._context, self._timeout, self._folder, self._say = context, timeout, Path(folder), say
        self._awake = SuspendDetector()
        # A connection of its own: another one may be blocked in a wait.
        self._store = BoundedStore(context.store.clone(), self._awake)
        self._main = threading.get_ident()
        self._beats, self._seconds = 0, min(BEAT_SECONDS, timeout / 4) if timeout else BEAT_SECONDS
        self._patience = 2 + SILENT_BEATS * self._seconds
        self._over, self._gone, self._leaving = (
            threading.Event(),
            threading.Event(),
            threading.Event(),
        )
        self._failed, self._ending = False, 0.0
        self._next_beat, self._heard = -1, time.monotonic()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, *unused: object) -> None:
        self.stop_reporting()
        self._gone.set()
        # It may be the last to hold the groups: to free them while Python itself ends would abort the process.
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def stop_reporting(self) -> None:
        """From here on the store is left alone, since it may go with the first rank that leaves. What is left to do, to
        leave the groups, must be done within `timeout` seconds: else this rank ends by itself."""
        if not self._over.is_set():
            self._over.set()
            self._leaving.set()
            self._thread.join()
            if self._timeout:
                self._dump_stacks_after(self._timeout + ANSWER_SECONDS, exit=True)
                self._thread = threading.Thread(
                    target=self._watch_the_end, name="watchdog", daemon=True
                )
                self._thread.start()

    # What the thread does --------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        over = False
        while not over:  # the first report comes at once: who dies before it is not known to anyone
            try:
                if not self._failed:  # else rank 0 may have ended by now, with the store
                    self._beat()
            except (
                Exception
            ) as error:  # whatever it is, this thread goes on: it alone can end a job that hangs
                if self._hangs:
                    self._end_alone(error)
            over = self._awake.wait(self._over, self._seconds)

    def _watch_the_end(self) -> None:
        if not self._awake.wait(self._gone, self._timeout):
            self._end_alone("others may have ended already")

    def _beat(self) -> None:
        if self._timeout:
            self._dump_stacks_after(self._timeout)
        self._report()
        self._listen()
        if self._hangs or self._store.add("hangs", 0):
            self._end(judge=self._hangs and self._store.add("hangs", 1) == 1)
        if self._ending or self._store.check("ending"):
            self._ending = self._ending or time.monotonic()
            if time.monotonic() - self._ending > LINGER_SECONDS / 2 and not self._leaving.is_set():
                self._leave()

    @staticmethod
    def _dump_stacks_after(seconds: float, exit: bool = False) -> None:
        """Should no thread of this class ever run again, since another one keeps Python's lock."""
        faulthandler.dump_traceback_later(seconds, exit=exit, file=sys.__stderr__)

    def _listen(self) -> None:
        """Note when the next rank has reported: each is looked after by one other."""
        key = f"report/{(self._context.rank + 1) % self._context.world_size}"
        for text in self._store.get_those_there([key]).values():
            beat = Report.from_json(text).beat
            if beat != self._next_beat:
                self._next_beat, self._heard = beat, time.monotonic()

    @property
    def _idle_seconds(self) -> float:
        return min(self._context.activity.idle_seconds, time.monotonic() - self._awake.since)

    @property
    def _silence(self) -> float:
        """Seconds since the next rank, or the store, was heard."""
        return time.monotonic() - max(self._heard, self._awake.since)

    @property
    def _hangs(self) -> bool:
        silent = self._silence > max(self._timeout, SILENT_SECONDS)
        return self._timeout > 0 and (silent or self._idle_seconds > self._timeout)

    def _leave(self) -> NoReturn:
        """Another rank has failed or died, and this one does not notice: it computes, or waits on its GPU or for a rank
        that is in no haste, such as rank 0, which keeps the store for us."""
        try:
            if told := self._agree_on_the_reason():
                self._say(f"rank {self._context.rank}: {told}")
            if self._context.rank == 0:
                _linger(self._context.store, self._context.world_size)
        finally:
            os._exit(1)

    def _report(self, **stacks: str) -> None:
        context = self._context
        blocks = context.device.type == "cpu"
        who = context.rank, context.host, os.getpid()
        report = Report.of(context.activity, *who, blocks, beat=self._beats, **stacks)
        report = replace(report, idle_seconds=self._idle_seconds)
        self._store.set(f"report/{context.rank}", report.to_json())
        self._beats += 1

    def _end(self, judge: bool) -> NoReturn:
        """Leave the stacks of this rank; judge, or wait until another rank has; end the process, whatever happens."""
        try:
            self._report(stack=self._main_stack(), threads=_all_threads())
            (self._judge if judge else self._wait_for_the_judge)()
            if self._context.rank == 0:
                time.sleep(OTHERS_FIRST_SECONDS / 2)  # the store may live in this process
        except Exception as error:
            if judge:
                self._end_alone(error)
        finally:
            os._exit(HUNG)

    def _judge(self) -> None:
        """Say who is to blame, and write the file of stacks. Others wait as long as the count "judging" grows."""
        reports = self._collect(lambda report: bool(report.threads), self._patience)
        self._store.add("judging", 1)
        idle = max(report.idle_seconds for report in reports.values()) or self._silence
        step = max(report.step for report in reports.values())
        file = self._folder / f"hang-step-{step}.txt"
        verdict = hang_verdict(reports, idle, SILENT_BEATS * self._seconds, str(file))
        self._say(verdict)  # before the file: its disk may be what hangs
        threading.Thread(
            target=self._write_stacks, args=(file, all_stacks(verdict, reports)), daemon=True
        ).start()
        self._wait_for_the_judge()

    def _write_stacks(self, file: Path, parts: Iterable[str]) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with open(file, "w") as stream:
                for part in parts:
                    stream.write(part)
                    self._store.add("judging", 1)
        except OSError as error:
            self._say(f"  ({file} is not written: {error})")
        with suppress(RuntimeError):  # of torch's store
            self._store.set("judged", "yes")

    def _wait_for_the_judge(self) -> None:
        count, moved = -1, time.monotonic()
        while not self._store.check("judged") and time.monotonic() - moved < 2 * self._patience:
            before, count = count, self._store.add("judging", 0)
            if count != before:
                moved = time.monotonic()
            time.sleep(POLL_SECONDS)

    def _end_alone(self, reason: Exception | str) -> NoReturn:
        """Nobody else can be asked: rank 0 or its node is stopped, dead or cut off, or ranks are leaving."""
        context, text = self._context, str(reason).partition("\n")[0] or type(reason).__name__
        seconds = self._idle_seconds or self._silence
        try:
            self._say(
                f"HANG: no progress for {seconds:.0f} s on rank {context.rank} of {context.host}, in "
                f"{context.activity.waiting or 'no call'}; others cannot be asked: {text}\n{self._main_stack()}"
            )
        finally:
            os._exit(HUNG)

    def _main_stack(self) -> str:
        frame = sys._current_frames().get(self._main)
        return "".join(traceback.format_stack(frame)) if frame is not None else ""

    # What others want to know ----------------------------------------------------------------------------------------

    def _collect(self, complete: Callable[[Report], bool], patience: float) -> dict[int, Report]:
        """The reports of all ranks, once each is complete or `patience` seconds are over."""
        began, wanted, found = time.monotonic(), set(range(self._context.world_size)), {}
        while wanted and time.monotonic() < began + patience:
            texts = self._store.get_those_there(f"report/{rank}" for rank in sorted(wanted))
            told = {report.rank: report for report in map(Report.from_json, texts.values())}
            found |= told
            wanted -= {rank for rank, report in told.items() if complete(report)}
            time.sleep(POLL_SECONDS if wanted else 0)
        waited = time.monotonic() - began
        unknown = Report(-1, "a host unknown", 0, 0, "starting", 0.0, [])
        lost = {
            rank: replace(found.get(rank, unknown), rank=rank, silent_seconds=waited)
            for rank in wanted
        }
        return found | lost

    def failed(self, message: str) -> bool:
        """Leave word of why this rank ends, before its connections break. Whether another rank ends with the very same
        message, and has had the time to say it."""
        self._failed = True
        self._leaving.set()
        with suppress(RuntimeError):  # of torch's store: the job ends anyway
            number = self._store.add("failures", 1)
            text = json.dumps(
                [self._context.rank, self._context.host, message or "see what rank 0 says"]
            )
            self._store.set(f"failure/{number}", text)
            self._store.set("ending", "yes")
            same = number > 1 and json.loads(self._store.get("failure/1"))[2] == message
            self._know([self._context.rank])
            if same:
                time.sleep(LINGER_SECONDS / 2)
                return True
        return False

    def _know(self, ranks: Iterable[int]) -> None:
        """These ranks need the store no longer: they know why the job ends, or are dead."""
        for rank in ranks:
            self._store.set(f"knows/{rank}", "")
            if rank == self._context.rank == 0:  # once its own words are out
                atexit.register(_linger, self._context.store, self._context.world_size)

    def why_contact_was_lost(self) -> str:
        """Which rank failed or died, in words, on the first rank that asks; "" on the others. Takes a few seconds."""
        self._leaving.set()
        # A launcher sends SIGTERM to all as soon as one has died: that must not cut off the explanation.
        before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            return self._agree_on_the_reason()
        except RuntimeError:  # of torch's store
            return "rank 0, or torchrun on the first node, is gone: see what it says; without a word, it was killed"
        finally:
            signal.signal(signal.SIGTERM, before)

    def _agree_on_the_reason(self) -> str:
        first, told = self._store.add("speakers", 1) == 1, ""
        if first:
            self._store.set("ending", "yes")
            told = self._reason()
            time.sleep(OTHERS_FIRST_SECONDS)
            self._store.set("spoken", "yes")
        end = time.monotonic() + 2 * ANSWER_SECONDS
        while not self._store.check("spoken") and time.monotonic() < end:
            time.sleep(POLL_SECONDS)
        self._know([self._context.rank])
        if not first:
            time.sleep(OTHERS_FIRST_SECONDS)
        return told

    def _reason(self) -> str:
        time.sleep(OTHERS_FIRST_SECONDS)
        if not self._store.add("failures", 0):
            before = self._collect(lambda report: True, 0.5)
            dead = self._collect(
                lambda report: report.beat > before[report.rank].beat, SILENT_BEATS * BEAT_SECONDS
            )
            silent = [report for report in dead.values() if report.silent_seconds]
            gone = [
                report for report in silent if not self._store.check(f"knows/{report.rank}")
            ]  # nor has failed now
            if gone:
                self._know(report.rank for report in gone)
                names = "; ".join(
                    f"{report.where} died without a word (last heard: {report.state})"
                    for report in gone[:3]
                )
                return f"{names}: killed by hand, for want of memory, or with its node (see dmesg and `sacct -j JOB`)"
        if not self._store.add("failures", 0):
            return ""
        who, host, message = json.loads(self._store.get("failure/1"))
        return f"rank {who} on {host} failed: {message}"


def _linger(store: Any, size: int) -> None:
    """Rank 0's process may hold the store: it ends when all ranks know why, or some seconds are over. By torch's store
    alone: at exit no thread can be started any more, as a BoundedStore does."""
    end = time.monotonic() + LINGER_SECONDS
    with suppress(RuntimeError):  # of torch's store, which torchrun may have taken along
        while not store.check([f"knows/{rank}" for rank in range(size)]) and time.monotonic() < end:
            time.sleep(POLL_SECONDS)
    time.sleep(OTHERS_FIRST_SECONDS)


def _all_threads() -> str:
    """The stack of every Python thread of this process, as faulthandler writes it."""
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read().decode(errors="replace")
