"""Ranks for tests: worker processes that are started once and run one function after another.

    def sum_of_ranks(launch): ...               # at the top level of a test module
    results = pool.run(sum_of_ranks, 4)         # [result of rank 0, ..., result of rank 3]

The workers are forked from a server that has torch loaded (a fresh interpreter per rank takes
seconds). After a failure all workers of that run are killed, since a group that lost a peer is of
no use, and the next run starts fresh ones.
"""

import faulthandler
import gc
import multiprocessing
import os
import pickle
import random
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from megalite.parallel.launch import LaunchInfo

PRELOAD = ["torch", "torch.distributed", "torch._dynamo", "numpy", "pytest"]
"""torch._dynamo, since optimizers and checkpointing import it at their first use: a second for each
rank."""
GRACE_SECONDS = 0.5
"""After a first failure the other ranks get this long to report one of their own."""
STACK_SIGNAL = signal.SIGUSR2
"""Not SIGUSR1, which asks a training run to save and exit."""
WAITING_FOR_OTHERS = re.compile(
    r"distributed_c10d\.py|[Cc]onnection (reset|closed|refused)|[Bb]roken pipe"
)
"""In the trace of a rank that is a victim: it was in communication, or lost its peer."""


class RanksFailed(Exception):
    """A run that did not end well on every rank. The message has each failed rank's traceback or
    stack, causes first.

    `ranks` lists them in the same order.
    """

    def __init__(self, what: str, failures: "list[Failure]", finished: list[int]):
        self.ranks = [failure.rank for failure in failures]
        lines = [f"{what}:", *(f"  rank {failure.rank} {failure.summary}" for failure in failures)]
        lines += [f"  finished: ranks {finished}"] if finished else []
        lines += [
            f"\n--- rank {failure.rank}\n{failure.trace}" for failure in failures if failure.trace
        ]
        super().__init__("\n".join(lines))


@dataclass(frozen=True)
class Failure:
    """How one rank failed."""

    rank: int
    when: float
    """Time of the monotonic clock, which all processes of a machine share."""
    summary: str
    trace: str
    died: bool = False

    @property
    def order(self) -> tuple[bool, float]:
        """Sorts causes before ranks that only waited for them, then by time."""
        waited = WAITING_FOR_OTHERS.search(self.summary + self.trace)
        return bool(waited) and not self.died, self.when


@dataclass(frozen=True)
class Worker:
    """One process of the pool, as its parent sees it."""

    process: BaseProcess
    connection: Connection
    log: Path
    """What the process wrote to its stderr during the latest call, C++ and stack dumps included."""

    def kill(self) -> None:
        """End the process, whatever it is doing."""
        self.process.kill()
        self.process.join()
        self.connection.close()
        self.log.unlink(missing_ok=True)

    def stack(self) -> str:
        """What each Python thread of the (hung) process is doing, innermost call first."""
        with suppress(ProcessLookupError):
            os.kill(self.process.pid, STACK_SIGNAL)
        size, deadline = 0, time.monotonic() + 2
        while (
            time.monotonic() < deadline
        ):  # the dump has no end mark: it is complete when it stops growing
            time.sleep(0.05)
            size, before = self.log.stat().st_size, size
            if size == before > 0:
                break
        return self.output()

    def output(self) -> str:
        """The log, without the frames below the rank's own function."""
        below = re.compile(
            rf'  File "{re.escape(__file__)}", .*(\n  (File|\.\.\.).*)*|Extension modules: .*'
        )
        return below.sub("", self.log.read_text(errors="replace")).rstrip()


class RankPool:
    """Up to `max_ranks` processes that run functions as ranks, each started when first needed.
    `close` ends them."""

    def __init__(self, max_ranks: int = 8):
        self.max_ranks = max_ranks
        self._folder = tempfile.TemporaryDirectory(prefix="megalite-ranks-")
        self._workers: list[Worker] = []
        self._started = 0
        self._runs = 0
        self._fork = multiprocessing.get_context("forkserver")
        self._fork.set_forkserver_preload(PRELOAD)

    def close(self) -> None:
        """End all workers."""
        self._discard(self._workers)
        self._folder.cleanup()

    def run(
        self, function: Callable, world_size: int, *args: Any, timeout: float = 60.0
    ) -> list[Any]:
        """`function(launch, *args)` on ranks 0 .. world_size - 1 at once; their results, by rank.

        The function is found by its name: it stands at the top level of a module. Arguments and
        results travel by pickle. It may create process groups from `launch`; the pool destroys what
        is left of them before the next run. Assert on results in the test rather than in the
        function: only there does pytest explain what differs.

        Raises RanksFailed when a rank raises, dies, or is not done after `timeout` seconds,
        ValueError when there are not so many ranks.
        """
        if not 1 <= world_size <= self.max_ranks:
            raise ValueError(f"{world_size} ranks asked for, this pool has 1 to {self.max_ranks}")
        self._runs += 1
        rendezvous = Path(self._folder.name, f"rendezvous-{self._runs}")
        launches = [
            LaunchInfo(
                rank=rank,
                world_size=world_size,
                local_rank=rank,
                local_world_size=world_size,
                init_method=f"file://{rendezvous}",
                source="tests",
            )
            for rank in range(world_size)
        ]
        tasks = [pickle.dumps((function, launch, args)) for launch in launches]
        workers = self._first(world_size)
        try:
            results, failures = _collect(workers, tasks, timeout)
            if failures:
                name = f"{function.__module__}.{function.__qualname__} on {world_size} ranks"
                raise RanksFailed(name, failures, sorted(results))
        except BaseException:
            self._discard(workers)
            raise
        finally:
            rendezvous.unlink(missing_ok=True)
        return [results[rank] for rank in range(world_size)]

    def _first(self, count: int) -> list[Worker]:
        """The first `count` workers, started if they are not there."""
        while len(self._workers) < count:
            self._started += 1
            log = Path(self._folder.name, f"worker-{self._started}.log")
            ours, theirs = self._fork.Pipe()
            process = self._fork.Process(target=_serve, args=(theirs, log), daemon=True)
            process.start()
            theirs.close()  # so that the worker's end is closed when the worker dies
            self._workers.append(Worker(process, ours, log))
        return self._workers[:count]

    def _discard(self, workers: list[Worker]) -> None:
        self._workers = [worker for worker in self._workers if worker not in workers]
        for worker in workers:
            worker.kill()


def _collect(
    workers: list[Worker], tasks: list[bytes], timeout: float
) -> tuple[dict[int, Any], list[Failure]]:
    """Give each worker its task and wait for all: results by rank, and failures, causes first."""
    pending = {worker.connection: rank for rank, worker in enumerate(workers)}
    results: dict[int, Any] = {}
    failures: list[Failure] = []
    for worker, task in zip(workers, tasks, strict=True):
        with suppress(BrokenPipeError):  # it died since its last run: reading from it says so
            worker.connection.send_bytes(task)
    deadline = time.monotonic() + timeout
    while pending and (ready := wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))):
        for connection in ready:
            rank = pending.pop(connection)
            outcome = _receive(workers[rank], rank)
            if isinstance(outcome, Failure):
                failures.append(outcome)
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
            else:
                results[rank] = outcome[0]
    how = (
        f"was not done {GRACE_SECONDS:g} s later"
        if failures
        else f"was not done after {timeout:g} s"
    )
    failures += [
        Failure(rank, time.monotonic(), how, workers[rank].stack()) for rank in pending.values()
    ]
    return results, sorted(failures, key=lambda failure: failure.order)


def _receive(worker: Worker, rank: int) -> "tuple[Any] | Failure":
    """What a rank ended with: (result,), or how it failed."""
    try:
        succeeded, *content = pickle.loads(worker.connection.recv_bytes())
    except (EOFError, ConnectionResetError):
        when = time.monotonic()
        worker.process.join(timeout=5)
        code = worker.process.exitcode
        how = (
            f"was killed by {signal.Signals(-code).name}"
            if code and code < 0
            else f"exited with status {code}"
        )
        return Failure(rank, when, how, worker.output(), died=True)
    return (content[0],) if succeeded else Failure(rank, *content)


def _serve(connection: Connection, log: Path) -> None:
    """The life of a worker: run what comes until the parent hangs up."""
    # Python's own output stays visible; C++ code writes to 1 and 2, and what it says last explains
    # an abort.
    sys.stdout = os.fdopen(os.dup(1), "w", buffering=1)
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    faulthandler.enable(all_threads=True)
    faulthandler.register(STACK_SIGNAL, all_threads=True)
    environment, folder = dict(os.environ), os.getcwd()
    gc.freeze()  # what is imported: a collection then takes milliseconds
    while True:
        try:
            task = connection.recv_bytes()
        except EOFError:
            return
        os.ftruncate(descriptor, 0)
        try:
            # Before a call, not after: a rank that is done must not break the connections of those
            # that are not.
            _reset(environment, folder)
            function, launch, args = pickle.loads(task)
            answer = pickle.dumps((True, function(launch, *args)))
        except BaseException as error:
            summary = f"raised {type(error).__name__}: {error}".splitlines()[0]
            answer = pickle.dumps((False, time.monotonic(), summary, _trace_of(error)))
        connection.send_bytes(answer)


def _trace_of(error: BaseException) -> str:
    """The traceback as text, without this module's frame."""
    return "".join(
        traceback.format_exception(type(error), error, error.__traceback__.tb_next)
    ).rstrip()


def _reset(environment: dict[str, str], folder: str) -> None:
    """Put back what a function may have left changed in this process."""
    import numpy
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        gc.collect()  # objects in reference cycles may hold groups, whose threads would stay
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    torch.use_deterministic_algorithms(False)
    torch.manual_seed(0)
    numpy.random.seed(0)
    random.seed(0)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
