"""Kill -9 at each step and at random moments of real saves: the latest checkpoint always opens,
verifies, and is the newest that was written."""

import itertools
import os
import random
import signal
import sys
import time

import pytest
import torch

from megalite.checkpoint.background import AsyncSaver
from megalite.checkpoint.load import Checkpoint
from tests.checkpoint.helpers import FILE_OPERATIONS, cut, part, save, whole

TRIALS = 15
SHAPE = (64, 256)


def save_until_killed(root, first, ready):
    """Save number 0, 1, 2, ...: each iteration twice, so that folders are replaced; the second
    prunes, too."""
    log = os.open(root / "log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    number = first
    while True:
        start = time.monotonic()
        tensor = torch.full(SHAPE, float(number))
        shards = [part("w", tensor, box) for box in cut(SHAPE, 0, 3)]
        save(root, iteration_of(number), *shards, state={"number": number}, keep_last=2)
        os.write(log, f"{number}\n".encode())
        if number == first:
            ready.send(time.monotonic() - start)
        number += 1


def iteration_of(number):
    return 10 * (1 + number // 2)


def save_in_thread(root, iteration, *shards, keep_last):
    """As `save`, asynchronously; the copied tensors are changed at once."""
    saver = AsyncSaver()
    saver.start(
        iteration, shards, {}, lambda copies, _: save(root, iteration, *copies, keep_last=keep_last)
    )
    for shard in shards:
        shard.tensor.zero_()
    saver.finish()


def save_until_step(root, iteration, last_step, save):
    """Save number 2, and be killed just before the file operation of number `last_step`."""
    steps = itertools.count(1)

    def count(event, _):
        if event in FILE_OPERATIONS and next(steps) == last_step:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    save(root, iteration, whole("w", torch.tensor(2.0)), keep_last=1)


@pytest.mark.parametrize(
    ("iteration", "saving"),
    [(30, save), (20, save), (30, save_in_thread)],
    ids=["a new iteration", "the latest again", "asynchronous"],
)
def test_a_kill_before_each_file_operation_leaves_the_latest_or_the_new_one(
    tmp_path, forkserver, iteration, saving
):
    values, exit_code = [], None
    while exit_code != 0:
        root = tmp_path / str(len(values))
        save(root, 10, whole("w", torch.tensor(0.0)))
        save(root, 20, whole("w", torch.tensor(1.0)))
        process = forkserver.Process(
            target=save_until_step, args=(root, iteration, len(values) + 1, saving), daemon=True
        )
        process.start()
        process.join()
        exit_code = process.exitcode
        assert exit_code in (0, -signal.SIGKILL)
        with Checkpoint.open(root) as checkpoint:
            checkpoint.verify()
            values.append(checkpoint.read("w").item())
        save(root, 40, whole("w", torch.tensor(3.0)))
        assert Checkpoint.open(root).read("w").item() == 3
        assert not list(root.glob(".writing.*/*"))
    assert values == sorted(values)  # the old one up to the commit, the new one from there on
    assert set(values) == {1, 2}
    assert len(values) > 10


def test_a_kill_at_any_moment_leaves_a_whole_latest_checkpoint(tmp_path, forkserver):
    generator = random.Random()
    number, killed_while_saving = -1, 0
    for _ in range(TRIALS):
        here, there = forkserver.Pipe(duplex=False)
        process = forkserver.Process(
            target=save_until_killed, args=(tmp_path, number + 1, there), daemon=True
        )
        process.start()
        there.close()
        seconds_of_a_save = here.recv()
        time.sleep(generator.uniform(0, 3 * seconds_of_a_save))
        process.kill()
        process.join()
        killed_while_saving += any(tmp_path.glob(".writing.*/*"))
        finished = [int(line) for line in (tmp_path / "log").read_text().split()]
        with Checkpoint.open(tmp_path) as checkpoint:
            checkpoint.verify()
            number = checkpoint.state["number"]
            # A save may have been committed just before it could be logged.
            assert number - 1 <= finished[-1] <= number
            assert checkpoint.iteration == iteration_of(number)
            assert torch.equal(checkpoint.read("w"), torch.full(SHAPE, float(number)))
    assert killed_while_saving > 0
