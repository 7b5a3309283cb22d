"""Kill -9 at random moments of real saves: the latest checkpoint always opens, verifies, and is the newest written."""

import multiprocessing
import os
import random
import time

import torch

from megalite.checkpoint.load import Checkpoint
from tests.checkpoint.helpers import cut, part, save
from tests.pool import PRELOAD

TRIALS = 15
SHAPE = (64, 256)


def save_until_killed(root, first, ready):
    """Save number 0, 1, 2, ...: each iteration twice, so that folders are replaced; the second prunes, too."""
    log = os.open(root / "log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    number = first
    while True:
        start = time.monotonic()
        tensor = torch.full(SHAPE, float(number))
        pieces = [part("w", tensor, box) for box in cut(SHAPE, 0, 3)]
        save(root, iteration_of(number), *pieces, state={"number": number}, keep_last=2)
        os.write(log, f"{number}\n".encode())
        if number == first:
            ready.send(time.monotonic() - start)
        number += 1


def iteration_of(number):
    return 10 * (1 + number // 2)


def test_a_kill_at_any_moment_leaves_a_whole_latest_checkpoint(tmp_path):
    forkserver = multiprocessing.get_context("forkserver")
    forkserver.set_forkserver_preload(PRELOAD)
    generator = random.Random()
    number, killed_while_saving = -1, 0
    for _ in range(TRIALS):
        here, there = forkserver.Pipe(duplex=False)
        process = forkserver.Process(target=save_until_killed, args=(tmp_path, number + 1, there), daemon=True)
        process.start()
        seconds_of_a_save = here.recv()
        time.sleep(generator.uniform(0, 3 * seconds_of_a_save))
        process.kill()
        process.join()
        killed_while_saving += any(tmp_path.glob(".iter_*"))
        finished = [int(line) for line in (tmp_path / "log").read_text().split()]
        with Checkpoint.open(tmp_path) as checkpoint:
            checkpoint.verify()
            number = checkpoint.state["number"]
            # A save may have been committed just before it could be logged.
            assert number - 1 <= finished[-1] <= number
            assert checkpoint.iteration == iteration_of(number)
            assert torch.equal(checkpoint.read("w"), torch.full(SHAPE, float(number)))
    assert killed_while_saving > 0
