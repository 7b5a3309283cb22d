"""--profile: traces of torch's profiler for some iterations, and snapshots of GPU memory."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from megalite.config.training import TrainingConfig
from megalite.parallel.collectives import barrier
from megalite.parallel.context import ParallelContext
from megalite.system.errors import error_message

MAX_MEMORY_EVENTS = 1_000_000
"""Allocations that a snapshot of GPU memory remembers."""


class Profiler:
    """Profiles the ranges of iterations in --profile, on the ranks in --profile-ranks."""

    def __init__(self, training: TrainingConfig, context: ParallelContext):
        ranges = training.profile_ranges if training.profile is not None else []
        self._firsts = {first for first, _ in ranges}
        self._lasts = {last for _, last in ranges}
        self._enabled = str(context.rank) in training.profile_ranks
        self._folder = Path(training.profile_dir)
        self._context = context
        self._open: contextlib.ExitStack | None = None

    @contextlib.contextmanager
    def iteration(self, iteration: int) -> Iterator[None]:
        """Wraps an iteration. At the end of a range all ranks wait for those that write."""
        if self._enabled and iteration in self._firsts:
            self._begin(iteration)
        yield
        if iteration in self._lasts:
            self._context.activity.set_state("saving")
            self.close()
            barrier(self._context.control)
            self._context.activity.set_state("training")

    def close(self) -> None:
        """Write the open profile, complete or not. Prints a line when that fails."""
        if self._open is not None:
            try:
                self._open.close()
            except (OSError, RuntimeError) as error:
                problem = f"a profile was not written: {error_message(error)}"
                print(f"rank {self._context.rank}: {problem}", flush=True)
            self._open = None

    def _begin(self, first: int) -> None:
        name = self._folder / f"iteration-{first}-rank-{self._context.rank:05d}"
        kinds = [ProfilerActivity.CPU]
        # What is entered last is closed first: the profiler stops before its trace is written.
        self._open = contextlib.ExitStack()
        if self._context.device.type == "cuda":
            kinds.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=MAX_MEMORY_EVENTS)
            self._open.callback(torch.cuda.memory._record_memory_history, enabled=None)
            self._open.callback(torch.cuda.memory._dump_snapshot, f"{name}.memory.pickle")
        profiler = profile(activities=kinds, record_shapes=True)

        def write() -> None:
            self._folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(f"{name}.trace.json.gz")

        self._open.callback(write)
        self._open.enter_context(profiler)
