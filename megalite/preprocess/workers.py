"""Processes that encode blocks, and give back their results in the order of the blocks."""

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
BLOCKS_GIVEN = 2
"""Blocks that a worker has: the next one is there when it has done one."""


@contextmanager
def encoded_blocks(workers: int, build_encoder: Callable, config, blocks: Iterator[Block]):
    """(block, its result) of every block, in their order, made here (workers = 1) or by processes.

    `build_encoder(config)` makes what encodes a block, in each process.
    """
    if workers == 1:
        encoder = build_encoder(config)
        yield ((block, encoder(block)) for block in blocks)
        return
    context = multiprocessing.get_context("spawn")
    connections: dict[Connection, multiprocessing.Process] = {}
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            connections[ours] = context.Process(
                target=_serve, args=(theirs, build_encoder, config), daemon=True
            )
            with sigint_blocked():
                connections[ours].start()
            theirs.close()
        yield _in_order(connections, blocks)
    finally:
        for connection, process in connections.items():
            connection.close()
            process.terminate()
            process.join()


@contextmanager
def sigint_blocked():
    """Processes that are started in this block never get Ctrl-C, from their first instant on: it is for this one, which
    gets it after the block, and then ends them."""
    resource_tracker.ensure_running()  # started in the block, it would let the signal through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(connection: Connection, build_encoder: Callable, config) -> None:
    """A worker: encode what comes until the other end is closed, which it is also when the main process is killed."""
    os.environ.setdefault(
        "TOKENIZERS_PARALLELISM", "false"
    )  # of the tokenizers library: this is one of many processes
    jobs = SimpleQueue()
    # A thread takes blocks in, so that the main process can always give one, however large, and never waits for a
    # worker that waits for it to take a result.
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


def _in_order(workers: dict[Connection, multiprocessing.Process], blocks: Iterator[Block]):
    """Hand each worker the next block in time, and yield results in the order of the blocks."""
    numbered = enumerate(blocks)
    free = [*workers] * BLOCKS_GIVEN
    finished: dict[int, EncodedBlock | Exception] = {}
    given: dict[int, Block] = {}
    written = 0
    while True:
        while free and len(given) < BLOCKS_AHEAD * len(workers) and (job := next(numbered, None)):
            connection = free.pop(0)
            with _explaining_death(workers[connection]):
                connection.send(job)
            given[job[0]] = job[1]._replace(data=None)
        if not given:
            return
        if written in finished:
            result = finished.pop(written)
            if isinstance(result, Exception):
                raise result
            yield given.pop(written), result
            written += 1
            continue
        for connection in wait(workers):
            with _explaining_death(workers[connection]):
                number, finished[number] = connection.recv()
            free.append(connection)


@contextmanager
def _explaining_death(worker: multiprocessing.Process):
    try:
        yield
    except (EOFError, OSError):
        worker.join(timeout=10)
        raise DatasetError(
            f"a worker process died (exit code {worker.exitcode}); its message, if any, is above. "
            "If memory ran out (exit code -9), use fewer --workers"
        ) from None
