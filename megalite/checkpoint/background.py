"""Asynchronous saves: training waits for a copy to host memory, and a thread writes the copy."""

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace

import torch

from megalite.checkpoint.format import Shard
from megalite.system.background import in_background

ALIGNMENT = 64
"""Copies begin at multiples of this many bytes: it suits every dtype, and whole cache lines."""

WriteCopies = Callable[[Iterable[Shard], dict[str, torch.Tensor]], object]
"""Writes a checkpoint of shards and private tensors, as `save.write` does."""


@dataclass(frozen=True)
class SaveTimes:
    """How long an asynchronous save took."""

    iteration: int
    seconds: float
    """From its start until the checkpoint was the latest."""
    blocked_seconds: float
    """For how long training was stopped: for the copy, and to wait for the end of the save."""


class HostCopies:
    """Copies of tensors in host memory that is used again each time.

    One piece of memory for all of them, page-locked where the tensors are on a GPU.
    """

    def __init__(self):
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._is_pinned = False

    def reserve(self, tensors: Sequence[torch.Tensor]) -> list[int]:
        """Allocate memory for copies of these tensors, unless there is enough, and touch every
        page of it, which takes longer than a copy. Returns the byte at which each copy begins."""
        starts = []
        end = 0
        for tensor in tensors:
            starts.append(end)
            nbytes = tensor.numel() * tensor.itemsize
            end += -(-nbytes // ALIGNMENT) * ALIGNMENT
        if self._memory.nbytes < end:
            self._allocate(end, pinned=any(tensor.is_cuda for tensor in tensors))
        return starts

    def copy(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Dense copies of the tensors, as they are now. The next call overwrites them."""
        copies = []
        # Copies from a GPU are queued, after what computes the tensors; then all are waited for.
        for tensor, start in zip(tensors, self.reserve(tensors)):
            nbytes = tensor.numel() * tensor.itemsize
            copy = self._memory[start : start + nbytes].view(tensor.dtype).view(tensor.shape)
            copy.copy_(tensor.detach(), non_blocking=True)
            copies.append(copy)
        if self._is_pinned:
            torch.cuda.current_stream().synchronize()
        return copies

    def free(self) -> None:
        """Give the memory back; the copies must not be used any more."""
        if self._is_pinned:
            _check(torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr()))
        self._is_pinned = False
        self._memory = torch.empty(0, dtype=torch.uint8)

    def _allocate(self, nbytes: int, pinned: bool) -> None:
        self.free()
        memory = torch.empty(nbytes, dtype=torch.uint8).fill_(0)  # which touches every page
        if pinned:
            # Not torch's pinned memory, whose size is rounded up to a power of two.
            _check(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), nbytes, 0))
        self._memory = memory
        self._is_pinned = pinned


def _check(code) -> None:
    """Raise RuntimeError when a call of the CUDA runtime has failed."""
    if int(code):
        raise RuntimeError(f"page-locking host memory failed: CUDA error {int(code)}")


class AsyncSaver:
    """Saves of this rank that go on while it trains, one at a time.

    A save is collective in its own thread, so it needs a process group of its own: two threads must
    not use one group. The thread's calls are no part of the rank's activity either: they are made
    while the rank trains, and last as long as disks take.
    """

    def __init__(self):
        self._copies = HostCopies()
        self._running: Future | None = None
        self._iteration = 0
        self._began = self._ended = 0.0
        self._blocked_seconds = 0.0

    def reserve(self, shards: Iterable[Shard], private: dict[str, torch.Tensor]) -> None:
        """Allocate the memory for copies of these before the first save: a host that lacks it
        fails here, and no save waits for it. Raises RuntimeError."""
        self._copies.reserve([*(shard.tensor for shard in shards), *private.values()])

    def start(
        self,
        iteration: int,
        shards: Iterable[Shard],
        private: dict[str, torch.Tensor],
        write: WriteCopies,
    ) -> None:
        """Copy shards and private tensors, and let a thread write the copies. Returns after the
        copy. The save before must have been waited for.

        What fails here, such as an allocation, is raised by the shards that `write` iterates over,
        so that it is raised on every rank.
        """
        if self.is_pending:
            raise ValueError("the save before has not been waited for")
        self._iteration = iteration
        self._began = time.perf_counter()
        try:
            copied, private = self._copy(list(shards), private)
        except Exception as error:
            copied = _raise_when_read(error)
        self._running = in_background("save", lambda: self._write(write, copied, private))
        self._blocked_seconds = time.perf_counter() - self._began

    def _copy(
        self, shards: list[Shard], private: dict[str, torch.Tensor]
    ) -> tuple[list[Shard], dict[str, torch.Tensor]]:
        tensors = [shard.tensor for shard in shards]
        copies = self._copies.copy([*tensors, *private.values()])
        copied = [replace(shard, tensor=copy) for shard, copy in zip(shards, copies)]
        return copied, dict(zip(private, copies[len(shards) :]))

    def _write(self, write: WriteCopies, shards: Iterable[Shard], private: dict) -> None:
        write(shards, private)
        self._ended = time.perf_counter()

    @property
    def is_pending(self) -> bool:
        """Whether a save was started and not waited for; the same on every rank."""
        return self._running is not None

    @property
    def is_running(self) -> bool:
        """Whether this rank's thread is still writing."""
        return self._running is not None and not self._running.done()

    @property
    def has_failed(self) -> bool:
        """Whether this rank's thread has ended with an error, which `finish` raises."""
        running = self._running
        return running is not None and running.done() and running.exception() is not None

    def finish(self, timeout: float | None = None) -> SaveTimes:
        """Wait for the save that is pending. Raises what made it fail.

        With a timeout, raises TimeoutError after that many seconds; then it stays pending.
        """
        began = time.perf_counter()
        try:
            self._running.exception(timeout)
        finally:
            self._blocked_seconds += time.perf_counter() - began
        ended = self._running
        self._running = None
        ended.result()
        seconds = self._ended - self._began
        return SaveTimes(self._iteration, seconds, self._blocked_seconds)

    def close(self) -> None:
        """Give the memory back, unless a thread that was given up still reads from it."""
        if not self.is_running:
            self._copies.free()


def _raise_when_read(error: Exception) -> Iterable[Shard]:
    raise error
    yield  # makes this a generator, which raises when it is iterated over
