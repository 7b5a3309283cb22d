"""Worker processes that encode blocks; their results are returned in the order of the blocks."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from queue import SimpleQueue
from threading import Thread

from megalite.data.indexed import DatasetError
from megalite.data.tokenizers import TokenizerError
from megalite.preprocess.config import PreprocessConfig
from megalite.preprocess.encode import EncodedBlock, Encoder
from megalite.preprocess.inputs import Block

BLOCKS_AHEAD = 4
"""Blocks per worker that may be read before the oldest is written: what bounds memory."""
BLOCKS_PER_WORKER = 2
"""Blocks sent to a worker at a time: when it has finished one, it has the next one already."""


@contextmanager
def encoded_blocks(config: PreprocessConfig, blocks: Iterator[Block]):
    """Yields an iterator of (block, encoded block), in the order of the blocks.

    With --workers 1 this process encodes.
    """
    if config.workers == 1:
        encoder = Encoder(config)
        yield ((block, encoder(block)) for block in blocks)
    else:
        with running(_work, [(config,)] * config.workers) as processes:
            yield _in_order(processes, blocks)


@contextmanager
def running(target: Callable, arguments: Iterable[tuple]):
    """Yields new processes, each by its connection: `target(connection, *arguments)` runs in it.

    They never receive Ctrl-C. Only this process does, and ends them when it leaves the block.
    """
    context = multiprocessing.get_context("spawn")
    processes: dict[Connection, multiprocessing.Process] = {}
    # Started while the signal is blocked, the resource tracker would unblock it.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        for own in arguments:
            ours, theirs = context.Pipe()
            process = context.Process(target=target, args=(theirs, *own))
            process.start()
            processes[ours] = process
            theirs.close()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        yield processes
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for connection, process in processes.items():
            connection.close()
            process.terminate()
            process.join()


def _work(connection: Connection, config: PreprocessConfig) -> None:
    """A worker process: encode blocks until the connection is closed.

    The operating system closes it when the main process is killed.
    """
    # The tokenizers library would start threads; there is already a process for each core.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    jobs = SimpleQueue()
    # A thread receives blocks, so that the main process can send one of any size at any time, and
    # never waits for a worker that waits for it to receive a result.
    Thread(target=_receive, args=(connection, jobs), daemon=True).start()
    encoder = Encoder(config)
    while job := jobs.get():
        number, block = job
        try:
            result = encoder(block)
        except (TokenizerError, DatasetError, OSError) as error:
            result = error
        try:
            connection.send((number, result))
        except (BrokenPipeError, ConnectionResetError):
            return


def _receive(connection: Connection, jobs: SimpleQueue) -> None:
    try:
        while True:
            jobs.put(connection.recv())
    except (EOFError, OSError):
        jobs.put(None)


def _in_order(
    processes: dict[Connection, multiprocessing.Process], blocks: Iterator[Block]
) -> Iterator[tuple[Block, EncodedBlock]]:
    """Send blocks to workers as they become free, and yield results in the order of the blocks."""
    numbered = enumerate(blocks)
    free = [*processes] * BLOCKS_PER_WORKER
    sent: dict[int, Block] = {}
    finished: dict[int, EncodedBlock | Exception] = {}
    next_number = 0
    while True:
        # Send blocks while a worker is free and not too many are in flight.
        while free and len(sent) < BLOCKS_AHEAD * len(processes) and (job := next(numbered, None)):
            number, block = job
            connection = free.pop(0)
            with reporting_exit(processes[connection]):
                connection.send(job)
            sent[number] = block._replace(data=None)
        if not sent:
            return
        # Yield the next result if it is there.
        if next_number in finished:
            result = finished.pop(next_number)
            if isinstance(result, Exception):
                raise result
            yield sent.pop(next_number), result
            next_number += 1
            continue
        # Otherwise wait for any result.
        for connection in wait(processes):
            with reporting_exit(processes[connection]):
                number, finished[number] = connection.recv()
            free.append(connection)


@contextmanager
def reporting_exit(worker: multiprocessing.Process):
    """Turn the broken connection of a process that exited into a DatasetError with its status."""
    try:
        yield
    except (EOFError, OSError):
        worker.join(timeout=10)
        raise DatasetError(
            f"a worker process exited unexpectedly (exit code {worker.exitcode}); its message, if "
            "any, is above. If memory ran out (exit code -9), use fewer --workers"
        ) from None
