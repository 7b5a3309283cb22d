"""--trace: what each rank did in some iterations, for Perfetto and chrome://tracing.

The files have the Trace Event Format: a process for each rank, with a thread for what it computes,
one for communication and one for data. Times are of rank 0's clock, in microseconds.
"""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from megalite.config.training import TrainingConfig
from megalite.parallel.activity import Call, Span
from megalite.parallel.clocks import clock_offset
from megalite.parallel.collectives import (
    all_reduce,
    barrier,
    gather_objects,
    gather_objects_to_first,
)
from megalite.parallel.context import ParallelContext
from megalite.pipeline.schedules import WEIGHT
from megalite.system.errors import ALMOST_FULL_BYTES, error_message
from megalite.training.output import rank_0_printer

MERGED_FILE = "trace.json"
MERGED_RANKS = 64
"""Up to this many ranks, rank 0 also writes one file of all."""
THREADS = ("compute", "communication", "data")
"""By number, from 0."""
SHORT_AXES = {"tensor": "tp", "data": "dp", "pipeline": "pp"}


class _HostClock:
    """Moments are seconds of the clock of the host."""

    error = 0.0
    now = staticmethod(time.monotonic)

    def seconds(self, moment: float) -> float:
        """On the clock of the host."""
        return moment


class _DeviceClock:
    """Moments are CUDA events: when the GPU comes to that point of the current stream.

    The host only launches work, and runs ahead of the GPU.
    """

    def __init__(self, device: torch.device):
        torch.cuda.synchronize(device)
        before = time.monotonic()
        self._first = self.now()
        torch.cuda.synchronize(device)
        after = time.monotonic()
        self._began = (before + after) / 2
        self.error = (after - before) / 2
        """Seconds by which `seconds` is wrong, at most."""

    @staticmethod
    def now() -> torch.cuda.Event:
        """A moment."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, moment: torch.cuda.Event) -> float:
        """On the clock of the host, once the GPU has come there."""
        moment.synchronize()
        return self._began + self._first.elapsed_time(moment) / 1000


def rank_file(rank: int) -> str:
    """The name of a rank's file."""
    return f"trace-rank-{rank:05d}.json"


def check_trace_folder(folder: str | None, context: ParallelContext) -> None:
    """Raise OSError when this rank cannot write to --trace, or when its disk is full."""
    if folder is None:
        return
    draft = Path(folder) / f"{rank_file(context.rank)}.tmp"
    draft.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(draft, "wb") as file:
            file.write(bytes(ALMOST_FULL_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = str(draft)
        raise
    finally:
        draft.unlink(missing_ok=True)


class Tracer:
    """Traces the iterations in --trace-iterations, on all ranks. Collective.

    begins_at: the first iteration of this run.
    """

    def __init__(self, training: TrainingConfig, context: ParallelContext, begins_at: int):
        self._context = context
        self._log = rank_0_printer(context)
        self._folder = None if training.trace is None else Path(training.trace)
        self._first, self._last = training.trace_range(begins_at)
        self._clock: _HostClock | _DeviceClock = _HostClock()
        self._spans: dict[int, list[Span]] = {}
        """By iteration."""
        if self._folder is not None:
            reason = gather_objects(self._why_none(begins_at), context.control)[0]
            if reason:
                self._log(f"no trace: {reason}")
                self._folder = None

    def _why_none(self, begins_at: int) -> str:
        """Why this run makes no trace; "" if it does."""
        if self._first < begins_at:
            return f"it would begin at iteration {self._first}, this run begins at {begins_at}"
        if (self._folder / rank_file(0)).exists():
            return f"--trace {self._folder} holds that of an earlier run"
        return ""

    @contextmanager
    def iteration(self, iteration: int) -> Iterator[None]:
        """Wraps an iteration. After the last one that is traced, the files are written."""
        if self._folder is None or not self._first <= iteration <= self._last:
            yield
            return
        activity = self._context.activity
        if not self._spans and self._context.device.type == "cuda":
            self._clock = _DeviceClock(self._context.device)
        activity.now = self._clock.now
        activity.spans = self._spans[iteration] = []
        try:
            yield
        finally:
            activity.spans = None
        if iteration == self._last:
            self.finish()

    def finish(self) -> None:
        """Write what was traced and is not written yet; say so if the run has ended before."""
        if self._folder is None:
            return
        if self._spans:
            self._context.activity.set_state("saving")
            self._write(self._folder)
            barrier(self._context.control)
            self._context.activity.set_state("training")
        else:
            self._log(f"no trace: the run has ended before iteration {self._first}")
        self._folder = None
        self._spans.clear()

    def _write(self, folder: Path) -> None:
        """Each rank writes its file, and rank 0 that of all."""
        context = self._context
        offset = clock_offset(context.control)
        error = torch.tensor(offset.error + self._clock.error, dtype=torch.float64)
        events = _names(context) + self._events(offset.seconds)
        clock = {
            "rank": context.rank,
            "host": context.host,
            "offset_us": round(1e6 * offset.seconds, 3),
            "error_us": round(1e6 * error.item(), 3),
        }
        file = folder / rank_file(context.rank)
        written = self._write_file(file, events, [clock])
        if context.world_size <= MERGED_RANKS:
            of_ranks = gather_objects_to_first((clock, events), context.control)
            if of_ranks:
                file = folder / MERGED_FILE
                clocks, merged = [], []
                for clock_of_rank, events_of_rank in of_ranks:
                    clocks.append(clock_of_rank)
                    merged += events_of_rank
                written = self._write_file(file, merged, clocks)
        all_reduce(error, context.control, op="max")
        if written:
            what = f"iterations {self._first} to {max(self._spans)}"
            self._log(f"trace of {what}: {file}; clocks agree to {1e6 * error.item():.0f} us")

    def _events(self, offset: float) -> list[dict[str, Any]]:
        """The spans as events, from the first one of all ranks on. Collective.

        offset: seconds from this rank's clock to rank 0's.
        """
        times = []
        for iteration, spans in self._spans.items():
            for span in spans:
                began = self._clock.seconds(span.began) + offset
                ended = self._clock.seconds(span.ended) + offset
                times.append((iteration, span, began, ended))
        origin = torch.tensor(min(began for _, _, began, _ in times), dtype=torch.float64)
        all_reduce(origin, self._context.control, op="min")
        events = []
        for iteration, span, began, ended in times:
            event = _event(span, iteration) | {"ph": "X", "pid": self._context.rank}
            # Whole nanoseconds: what ends when the next begins does not overlap with it.
            start = round(1e9 * (began - origin.item()))
            event["ts"] = start / 1000
            event["dur"] = (round(1e9 * (ended - origin.item())) - start) / 1000
            events.append(event)
        return sorted(events, key=lambda event: event["ts"])

    def _write_file(self, file: Path, events: list[dict], clocks: list[dict]) -> bool:
        """Write a trace whole. Prints a line and returns False when that fails."""
        content = {
            "traceEvents": events,
            "displayTimeUnit": "ms",
            "otherData": {"iterations": list(self._spans), "clocks": clocks},
        }
        draft = file.with_name(f"{file.name}.tmp")
        try:
            draft.write_text(json.dumps(content))
            draft.replace(file)
            return True
        except OSError as error:
            problem = f"a trace was not written: {error_message(error)}"
            print(f"rank {self._context.rank}: {problem}", flush=True)
            with suppress(OSError):
                draft.unlink()
            return False


def _names(context: ParallelContext) -> list[dict[str, Any]]:
    """Metadata events: what the rank's process and its threads are called, and their order."""
    places = []
    for axis, position in context.coordinates.items():
        places.append(f"{SHORT_AXES[axis]} {position}")
    names = {"process_name": {"name": f"rank {context.rank} ({', '.join(places)})"}}
    names["process_sort_index"] = {"sort_index": context.rank}
    events = []
    for name, arguments in names.items():
        events.append({"ph": "M", "pid": context.rank, "name": name, "args": arguments})
    for tid, thread in enumerate(THREADS):
        event = {"ph": "M", "pid": context.rank, "tid": tid}
        events.append(event | {"name": "thread_name", "args": {"name": thread}})
        events.append(event | {"name": "thread_sort_index", "args": {"sort_index": tid}})
    return events


def _event(span: Span, iteration: int) -> dict[str, Any]:
    """Name, category, thread and arguments of a span's event."""
    arguments: dict[str, Any] = {"iteration": iteration}
    thread = span.phase if span.phase in THREADS else "compute"
    event = {"name": span.phase, "cat": span.phase, "tid": THREADS.index(thread), "args": arguments}
    if isinstance(span.what, Call):
        call = span.what
        event["name"] = f"{call.kind} {call.group}"
        arguments |= {"bytes": call.bytes, "number": call.number}
        if call.kind == "transfer":
            arguments["from"], arguments["to"] = call.ranks
    elif span.what is not None:
        kind, microbatch, stage = span.what
        event["name"] = f"{kind}{microbatch}"
        if kind == WEIGHT:
            event["cat"] = "weight"
        arguments |= {"kind": kind, "microbatch": microbatch, "stage": stage}
    return event
