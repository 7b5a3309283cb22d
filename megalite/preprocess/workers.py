"""Worker processes that encode blocks; their results are returned in the order of the blocks."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from queue import SimpleQueue
from threading import Thread

from megalite.data.indexed import DatasetError
from megalite.data.tokenizers import TokenizerError
from megalite.preprocess.encode import EncodedBlock
from megalite.preprocess.inputs import Block

BLOCKS_AHEAD = 4
"""Blocks per worker that may be read before the oldest is written: what bounds memory."""
BLOCKS_PER_WORKER = 2
"""Blocks sent to a worker at a time: when it has finished one, it has the next one already."""


@contextmanager
def encoded_blocks(workers: int, build_encoder: Callable, config, blocks: Iterator[Block]):
    """Yields an iterator of (block, encoded block), in the order of the blocks.

    Args:
        workers: processes that encode; 1 encodes in this process.
        build_encoder: `build_encoder(config)` makes the encoder of a process.
        config: its argument.
        blocks: the blocks.
    """
    if workers == 1:
        encoder = build_encoder(config)
        yield ((block, encoder(block)) for block in blocks)
        return
    context = multiprocessing.get_context("spawn")
    processes: dict[Connection, multiprocessing.Process] = {}
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            arguments = (theirs, build_encoder, config)
            process = context.Process(target=_work, args=arguments, daemon=True)
            processes[ours] = process
            with sigint_blocked():
                process.start()
            theirs.close()
        yield _in_order(processes, blocks)
    finally:
        for connection, process in processes.items():
            connection.close()
            process.terminate()
            process.join()


@contextmanager
def sigint_blocked():
    """Processes that are started in this block never receive Ctrl-C, from their first instruction.

    Only this process does, after the block, and it ends them.
    """
    # Started in the block, the resource tracker would unblock the signal.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(connection: Connection, build_encoder: Callable, config) -> None:
    """A worker process: encode blocks until the connection is closed.

    The operating system closes it when the main process is killed.
    """
    # The tokenizers library would start threads; there is already a process for each core.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    jobs = SimpleQueue()
    # A thread receives blocks, so that the main process can send one of any size at any time, and
    # never waits for a worker that waits for it to receive a result.
    Thread(target=_receive, args=(connection, jobs), daemon=True).start()
    encoder = build_encoder(config)
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
            with _reporting_exit(processes[connection]):
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
            with _reporting_exit(processes[connection]):
                number, finished[number] = connection.recv()
            free.append(connection)


@contextmanager
def _reporting_exit(worker: multiprocessing.Process):
    """Turn the broken connection of a worker that exited into a DatasetError with its status."""
    try:
        yield
    except (EOFError, OSError):
        worker.join(timeout=10)
        raise DatasetError(
            f"a worker process exited unexpectedly (exit code {worker.exitcode}); its message, if "
            "any, is above. If memory ran out (exit code -9), use fewer --workers"
        ) from None
