"""--profile: what a rank did in some iterations, as a trace of torch's profiler, and a GPU's memory as a snapshot."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from megalite.parallel.context import ParallelContext
from megalite.training.config import TrainingConfig

MOST_EVENTS = 1_000_000
"""Allocations that a snapshot of GPU memory remembers."""


class Profiler:
    """Profiles the ranges of iterations that --profile names, on the ranks of --profile-ranks."""

    def __init__(self, training: TrainingConfig, context: ParallelContext):
        mine = training.profile is not None and str(context.rank) in training.profile_ranks
        self._last_of = dict(training.profile_ranges) if mine else {}
        self._folder, self._context = Path(training.profile_dir), context
        self._open: contextlib.ExitStack | None = None
        self._last = 0

    @contextlib.contextmanager
    def iteration(self, iteration: int) -> Iterator[None]:
        """Around each iteration of the training."""
        if iteration in self._last_of:
            self._begin(iteration, self._last_of[iteration])
        try:
            yield
        finally:
            if self._open is not None and iteration == self._last:
                self.close()

    def close(self) -> None:
        """Write what is open, complete or not."""
        if self._open is not None:
            self._open.close()
            self._open = None

    def _begin(self, first: int, last: int) -> None:
        self.close()
        self._folder.mkdir(parents=True, exist_ok=True)
        name = self._folder / f"iteration-{first}-rank-{self._context.rank:05d}"
        self._open, self._last = contextlib.ExitStack(), last
        gpu = self._context.device.type == "cuda"
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
        profiler = profile(activities=kinds, record_shapes=True)
        if gpu:
            torch.cuda.memory._record_memory_history(max_entries=MOST_EVENTS)
            self._open.callback(torch.cuda.memory._record_memory_history, enabled=None)
            self._open.callback(torch.cuda.memory._dump_snapshot, f"{name}.memory.pickle")
        self._open.callback(lambda: profiler.export_chrome_trace(f"{name}.trace.json.gz"))
        self._open.enter_context(profiler)
