"""The watchdog: a thread of each rank that reports what it is doing, and ends a job that hangs.

Reports go through the rendezvous store, which works while every collective is stuck: gloo and NCCL
wait without holding Python's GIL. The rank that first finds no progress for the time allowed asks
all ranks for their stacks, determines which ranks block the others, and prints the verdict. A rank
that fails leaves its message in the store, so that ranks that lose contact with it can print why.
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
from threading import Thread
from typing import Any, NoReturn

from megalite.parallel.activity import Activity
from megalite.parallel.context import ParallelContext
from megalite.parallel.launch import OTHERS_FIRST_SECONDS
from megalite.system.errors import ReportedError
from megalite.watch.bounded import ANSWER_SECONDS, BoundedStore, SuspendDetector
from megalite.watch.verdict import Report, all_stacks, hang_verdict

HUNG = 70
"""Exit status of every rank of a job that hung (EX_SOFTWARE of sysexits.h)."""
HEARTBEAT_SECONDS = 1.0
"""Time between two reports of a rank."""
SILENT_HEARTBEATS = 4
"""A rank that misses this many reports is silent."""
SILENT_SECONDS = 15.0
"""A rank that is silent for this long, and for --hang-timeout, is gone in any state: a report takes
no time, and other threads hold the GIL for seconds at most."""
POLL_SECONDS = 0.2
"""Time between two looks for another rank's key in the store: a thousand ranks may look."""
LINGER_SECONDS = 5.0
"""How long rank 0 keeps the store, at most, for ranks that do not know yet why the job ends."""


class LostContact(ReportedError, RuntimeError):
    """Other ranks are gone. The message says which failed, and why; "" if another prints it."""


class Watchdog:
    """Watches over one rank, as a context manager.

    timeout: seconds without progress that count as a hang; 0: none do. folder: where the file with
    the stacks of all ranks is written. say: prints the verdict.
    """

    def __init__(
        self, context: ParallelContext, timeout: float, folder: str | Path, say: Callable = print
    ):
        self._context = context
        self._timeout = timeout
        self._folder = Path(folder)
        self._say = say
        # A process may have been started without stderr.
        self._stacks_go_to = sys.__stderr__ or open(os.devnull, "w")
        self._suspends = SuspendDetector()
        # A connection of its own: another one may be blocked in a wait.
        self._store = BoundedStore(context.store.clone(), self._suspends)
        self._main = threading.get_ident()
        self._seconds = HEARTBEAT_SECONDS
        if timeout:
            self._seconds = min(HEARTBEAT_SECONDS, timeout / 4)
        self._answer_seconds = 2 + SILENT_HEARTBEATS * self._seconds
        self._heartbeats = 0

        # How far the rank is on its way to the end.
        self._over = threading.Event()  # it reports no more
        self._leaving = threading.Event()  # it ends by itself
        self._gone = threading.Event()  # it has left the groups
        self._failed = False
        self._end_began = 0.0  # when it learnt that another rank ends the job

        # The next rank's latest report, and when it came.
        self._next_heartbeat = -1
        self._heard = time.monotonic()
        self._thread = Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        # A signal handler shows the thread that it interrupts. To read the stacks of threads that
        # run, as faulthandler's timer does, can crash a process that was only suspended.
        if self._timeout:
            faulthandler.register(signal.SIGALRM, file=self._stacks_go_to, all_threads=False)
        self._thread.start()
        return self

    def __exit__(self, *unused: object) -> None:
        self.stop_reporting()
        self._gone.set()
        # Its thread may be the last to hold the groups: to free them while Python exits would abort
        # the process.
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        if self._timeout:
            self._dump_stack_after(0)
            faulthandler.unregister(signal.SIGALRM)

    def stop_reporting(self) -> None:
        """Leave the store alone from here on, since it may end with the first rank that leaves.

        If leaving the groups then takes longer than `timeout` seconds, this rank ends its process.
        """
        if not self._over.is_set():
            self._over.set()
            self._leaving.set()
            self._thread.join()
            if self._timeout:
                self._dump_stack_after(0)
                limit = self._timeout + ANSWER_SECONDS
                faulthandler.dump_traceback_later(limit, exit=True, file=self._stacks_go_to)
                self._thread = Thread(target=self._watch_the_end, name="watchdog", daemon=True)
                self._thread.start()

    # The thread ---------------------------------------------------------------------------------

    def _watch(self) -> None:
        over = False
        while not over:  # the first report at once: a rank that dies before it is unknown to others
            try:
                if not self._failed:  # else rank 0 may have ended by now, with the store
                    self._heartbeat()
            # Whatever the error is, this thread continues: it alone can end a job that hangs.
            except Exception as error:
                if self._hangs:
                    self._end_alone(error)
            over = self._suspends.wait(self._over, self._seconds)

    def _watch_the_end(self) -> None:
        if not self._suspends.wait(self._gone, self._timeout):
            self._end_alone("others may have ended already")

    def _heartbeat(self) -> None:
        # Report, and note whether the next rank has.
        if self._timeout:
            self._dump_stack_after(self._timeout)
        self._report()
        self._listen()

        # A hang, found here or by another rank. The first rank to find it prints the verdict.
        if self._hangs or self._store.add("hangs", 0):
            self._end(judge=self._hangs and self._store.add("hangs", 1) == 1)

        # Another rank has failed or died, and this one has not noticed after some seconds.
        if self._end_began or self._store.check("ending"):
            self._end_began = self._end_began or time.monotonic()
            waited = time.monotonic() - self._end_began
            if waited > LINGER_SECONDS / 2 and not self._leaving.is_set():
                self._leave()

    @staticmethod
    def _dump_stack_after(seconds: float) -> None:
        """Print the main thread's stack, unless called again before; never if seconds is 0.

        A thread that does not release the GIL stops the watchdog, but not the timer's signal.
        """
        signal.setitimer(signal.ITIMER_REAL, seconds)

    def _listen(self) -> None:
        """Note when the next rank has reported: each rank is observed by the one before it."""
        key = f"report/{(self._context.rank + 1) % self._context.world_size}"
        for text in self._store.get_existing([key]).values():
            beat = Report.from_json(text).beat
            if beat != self._next_heartbeat:
                self._next_heartbeat = beat
                self._heard = time.monotonic()

    @property
    def _idle_seconds(self) -> float:
        return min(self._context.activity.idle_seconds, time.monotonic() - self._suspends.since)

    @property
    def _silence(self) -> float:
        """Seconds since the next rank's latest report was read from the store."""
        return time.monotonic() - max(self._heard, self._suspends.since)

    @property
    def _hangs(self) -> bool:
        silent = self._silence > max(self._timeout, SILENT_SECONDS)
        return self._timeout > 0 and (silent or self._idle_seconds > self._timeout)

    def _leave(self) -> NoReturn:
        """End this rank, which does not notice that another one has failed or died.

        It computes, or waits on its GPU, or for a rank that still runs, such as rank 0, which keeps
        the store.
        """
        try:
            if reason := self._reason_once():
                self._say(f"rank {self._context.rank}: {reason}")
            if self._context.rank == 0:
                _keep_store_open(self._context.store, self._context.world_size)
        finally:
            os._exit(1)

    def _report(self, **stacks: str) -> None:
        context = self._context
        who = {"rank": context.rank, "host": context.host, "pid": os.getpid()}
        blocks = context.device.type == "cpu"
        now = {"idle_seconds": self._idle_seconds, "beat": self._heartbeats}
        report = Report.of(context.activity, **who, blocks=blocks, **now, **stacks)
        self._store.set(f"report/{context.rank}", report.to_json())
        self._heartbeats += 1

    def _end(self, judge: bool) -> NoReturn:
        """Report the stacks of this rank, print the verdict or wait for it, and end the process."""
        try:
            self._report(stack=self._main_stack(), threads=_all_threads())
            if judge:
                self._print_verdict()
            else:
                self._wait_for_verdict()
            if self._context.rank == 0:
                time.sleep(OTHERS_FIRST_SECONDS / 2)  # the store may live in this process
        except Exception as error:
            if judge:
                self._end_alone(error)
        finally:
            os._exit(HUNG)

    def _print_verdict(self) -> None:
        """Print the verdict and write all stacks. Others wait while the count "judging" grows."""
        reports = self._collect(lambda report: bool(report.threads), self._answer_seconds)
        self._store.add("judging", 1)
        idle = max(report.idle_seconds for report in reports.values()) or self._silence
        step = max(report.step for report in reports.values())
        file = self._folder / f"hang-step-{step}.txt"
        silent_after = SILENT_HEARTBEATS * self._seconds
        verdict = hang_verdict(reports, idle, silent_after, file=str(file))
        self._say(verdict)  # before the file: its disk may be what hangs
        stacks = (file, all_stacks(verdict, reports))
        Thread(target=self._write_stacks, args=stacks, daemon=True).start()
        self._wait_for_verdict()

    def _write_stacks(self, file: Path, chunks: Iterable[str]) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with open(file, "w") as stream:
                for chunk in chunks:
                    stream.write(chunk)
                    self._store.add("judging", 1)
        except OSError as error:
            self._say(f"  ({file} is not written: {error})")
        with suppress(RuntimeError):  # of torch's store
            self._store.set("judged", "yes")

    def _wait_for_verdict(self) -> None:
        """Until the file of stacks is written, or its writer makes no progress."""
        count = -1
        progress = time.monotonic()
        limit = 2 * self._answer_seconds
        while not self._store.check("judged") and time.monotonic() - progress < limit:
            before = count
            count = self._store.add("judging", 0)
            if count != before:
                progress = time.monotonic()
            time.sleep(POLL_SECONDS)

    def _end_alone(self, reason: Exception | str) -> NoReturn:
        """End this rank when no other can be asked.

        Rank 0 or its node is stopped, dead or cut off from the network, or ranks are leaving.
        """
        context = self._context
        text = str(reason).partition("\n")[0] or type(reason).__name__
        seconds = self._idle_seconds or self._silence
        action = context.activity.action_name
        at = f", {action}" if action else ""
        try:
            self._say(
                f"HANG: no progress for {seconds:.0f} s on rank {context.rank} "
                f"of {context.host}{at}, in {context.activity.waiting or 'no call'}; "
                f"others cannot be asked: {text}\n{self._main_stack()}"
            )
        finally:
            os._exit(HUNG)

    def _main_stack(self) -> str:
        frame = sys._current_frames().get(self._main)
        return "".join(traceback.format_stack(frame)) if frame is not None else ""

    # Why a job ends ------------------------------------------------------------------------------

    def _collect(self, complete: Callable[[Report], bool], seconds: float) -> dict[int, Report]:
        """The reports of all ranks, once each is complete or the time is over."""
        began = time.monotonic()
        wanted = set(range(self._context.world_size))
        found: dict[int, Report] = {}
        while wanted and time.monotonic() < began + seconds:
            texts = self._store.get_existing(f"report/{rank}" for rank in sorted(wanted))
            for report in map(Report.from_json, texts.values()):
                found[report.rank] = report
                if complete(report):
                    wanted.remove(report.rank)
            time.sleep(POLL_SECONDS if wanted else 0)

        # Ranks without a complete report are silent.
        waited = time.monotonic() - began
        unknown = Report.of(Activity(), rank=-1, host="unknown host", pid=0)
        for rank in wanted:
            found[rank] = replace(found.get(rank, unknown), rank=rank, silent_seconds=waited)
        return found

    def report_failure(self, message: str) -> bool:
        """Leave the reason why this rank ends in the store, before its connections break.

        Returns whether another rank ends with the same message and has had the time to print it.
        """
        self._failed = True
        self._leaving.set()
        with suppress(RuntimeError):  # of torch's store: the job ends anyway
            number = self._store.add("failures", 1)
            text = message or "see what rank 0 says"
            failure = json.dumps([self._context.rank, self._context.host, text])
            self._store.set(f"failure/{number}", failure)
            self._store.set("ending", "yes")
            same = number > 1 and json.loads(self._store.get("failure/1"))[2] == message
            self._mark_informed([self._context.rank])
            if same:
                time.sleep(LINGER_SECONDS / 2)
                return True
        return False

    def _mark_informed(self, ranks: Iterable[int]) -> None:
        """Note that these ranks need no store any more: they know why the job ends, or died."""
        for rank in ranks:
            self._store.set(f"knows/{rank}", "")
            if rank == self._context.rank == 0:  # at exit: it prints its own message before
                atexit.register(_keep_store_open, self._context.store, self._context.world_size)

    def why_contact_was_lost(self) -> str:
        """Which rank failed or died, on the first rank that asks; "" on others. Takes seconds."""
        self._leaving.set()
        # A launcher sends SIGTERM to all when one has died: the reason is to be printed first.
        before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            return self._reason_once()
        except RuntimeError:  # of torch's store
            return (
                "rank 0, or torchrun on the first node, is gone: see its error message; "
                "without one, it was killed"
            )
        finally:
            signal.signal(signal.SIGTERM, before)

    def _reason_once(self) -> str:
        """Why the job ends, on the first rank that asks; "" on others, after time to print it."""
        first = self._store.add("speakers", 1) == 1
        reason = ""
        if first:
            self._store.set("ending", "yes")
            reason = self._reason()
            time.sleep(OTHERS_FIRST_SECONDS)
            self._store.set("spoken", "yes")
        end = time.monotonic() + 2 * ANSWER_SECONDS
        while not self._store.check("spoken") and time.monotonic() < end:
            time.sleep(POLL_SECONDS)
        self._mark_informed([self._context.rank])
        if not first:
            time.sleep(OTHERS_FIRST_SECONDS)
        return reason

    def _reason(self) -> str:
        """Which rank died or failed, as far as the reports and messages in the store tell."""
        time.sleep(OTHERS_FIRST_SECONDS)
        if not self._store.add("failures", 0):
            gone = self._find_dead()
            self._mark_informed(report.rank for report in gone)
            names = []
            for report in gone[:3]:
                doing = f"(last heard: {report.doing})"
                names.append(f"{report.where} exited without an error message {doing}")
            if names:
                return (
                    f"{'; '.join(names)}: killed (SIGKILL), out of memory, or node lost "
                    "(see dmesg and `sacct -j JOB`)"
                )
        if not self._store.add("failures", 0):
            return ""
        rank, host, message = json.loads(self._store.get("failure/1"))
        return f"rank {rank} on {host} failed: {message}"

    def _find_dead(self) -> list[Report]:
        """The last reports of ranks that report no more, without having left or failed."""
        before = self._collect(lambda report: True, 0.5)
        seconds = SILENT_HEARTBEATS * HEARTBEAT_SECONDS
        after = self._collect(lambda report: report.beat > before[report.rank].beat, seconds)
        dead = []
        for report in after.values():
            if report.silent_seconds and not self._store.check(f"knows/{report.rank}"):
                dead.append(report)
        return dead


def _keep_store_open(store: Any, size: int) -> None:
    """Wait until all ranks know why the job ends, for LINGER_SECONDS at most.

    For rank 0, whose process may hold the store. Uses torch's store itself: at exit no thread can
    be started, as a BoundedStore does.
    """
    end = time.monotonic() + LINGER_SECONDS
    keys = [f"knows/{rank}" for rank in range(size)]
    with suppress(RuntimeError):  # of torch's store, which may have ended with torchrun
        while not store.check(keys) and time.monotonic() < end:
            time.sleep(POLL_SECONDS)
    time.sleep(OTHERS_FIRST_SECONDS)


def _all_threads() -> str:
    """The stack of every Python thread of this process, as faulthandler writes it."""
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read().decode(errors="replace")
