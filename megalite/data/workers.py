"""Processes that encode blocks, and give back their results in the order of the blocks."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait

from megalite.data.encode import EncodedBlock
from megalite.data.indexed import DatasetError
from megalite.data.inputs import Block
from megalite.data.tokenizers import TokenizerError

BLOCKS_AHEAD = 4
"""Blocks per worker that may be read before the oldest is written: what bounds memory."""


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
            connections[ours] = context.Process(target=_serve, args=(theirs, build_encoder, config), daemon=True)
            connections[ours].start()
            theirs.close()
        yield _in_order(connections, blocks)
    finally:
        for connection, process in connections.items():
            connection.close()
            process.terminate()
            process.join()


def _serve(connection: Connection, build_encoder: Callable, config) -> None:
    """A worker: encode what comes until the other end is closed, which it is also when the main process is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # of the tokenizers library: this is one of many processes
    encoder = build_encoder(config)
    try:
        while True:
            number, block = connection.recv()
            try:
                connection.send((number, encoder(block)))
            except (TokenizerError, DatasetError) as error:
                connection.send((number, error))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def _in_order(workers: dict[Connection, multiprocessing.Process], blocks: Iterator[Block]):
    """Hand each idle worker the next block, and yield results in the order of the blocks.

    A worker has one block at a time, so neither end of a pipe waits for the other to read.
    """
    numbered = enumerate(blocks)
    idle, busy = list(workers), set()
    finished: dict[int, EncodedBlock | Exception] = {}
    given: dict[int, Block] = {}
    written = taken = 0
    while True:
        while idle and taken < written + BLOCKS_AHEAD * len(workers) and (job := next(numbered, None)):
            connection = idle.pop()
            with _explaining_death(workers[connection]):
                connection.send(job)
            given[job[0]] = job[1]._replace(data=None)
            busy.add(connection)
            taken += 1
        if not busy:
            return
        for connection in wait(busy):
            with _explaining_death(workers[connection]):
                number, finished[number] = connection.recv()
            busy.remove(connection)
            idle.append(connection)
        while written in finished:
            result = finished.pop(written)
            if isinstance(result, Exception):
                raise result
            yield given.pop(written), result
            written += 1


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
