"""--profile: what a rank did in some iterations, as a trace of torch's profiler, and a GPU's memory as a snapshot."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from megalite.config.training import TrainingConfig
from megalite.parallel.collectives import barrier
from megalite.parallel.context import ParallelContext

MOST_EVENTS = 1_000_000
"""Allocations that a snapshot of GPU memory remembers."""


class Profiler:
    """Profiles the ranges of iterations that --profile names, on the ranks of --profile-ranks."""

    def __init__(self, training: TrainingConfig, context: ParallelContext):
        ranges = training.profile_ranges if training.profile is not None else []
        self._firsts, self._lasts = {first for first, _ in ranges}, {last for _, last in ranges}
        self._mine = str(context.rank) in training.profile_ranks
        self._folder, self._context = Path(training.profile_dir), context
        self._open: contextlib.ExitStack | None = None

    @contextlib.contextmanager
    def iteration(self, iteration: int) -> Iterator[None]:
        """Around each iteration of the training. At the end of a range all ranks wait for those that write."""
        if self._mine and iteration in self._firsts:
            self._begin(iteration)
        yield
        if iteration in self._lasts:
            self._context.activity.set_state("saving")
            self.close()
            barrier(self._context.control)
            self._context.activity.set_state("training")

    def close(self) -> None:
        """Write what is open, complete or not. When that fails, a line says so."""
        if self._open is not None:
            try:
                self._open.close()
            except (OSError, RuntimeError) as error:
                print(f"rank {self._context.rank}: a profile was not written: {error}", flush=True)
            self._open = None

    def _begin(self, first: int) -> None:
        name = self._folder / f"iteration-{first}-rank-{self._context.rank:05d}"
        self._open = contextlib.ExitStack()
        gpu = self._context.device.type == "cuda"
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
        profiler = profile(activities=kinds, record_shapes=True)
        if gpu:
            torch.cuda.memory._record_memory_history(max_entries=MOST_EVENTS)
            self._open.callback(torch.cuda.memory._record_memory_history, enabled=None)
            self._open.callback(torch.cuda.memory._dump_snapshot, f"{name}.memory.pickle")

        def write() -> None:
            self._folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(f"{name}.trace.json.gz")

        self._open.callback(write)
        self._open.enter_context(profiler)
