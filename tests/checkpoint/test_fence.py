"""A run that was replaced writes no checkpoint any more, wherever it was interrupted."""

import itertools
import json
import resource
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Barrier, Semaphore, Thread, current_thread

import pytest
import torch

from megalite.checkpoint.fence import CONTINUE_FILE, Lease
from megalite.checkpoint.folder import (
    INDEX_FILE,
    LATEST_FILE,
    CheckpointError,
    latest_iteration,
    list_iterations,
)
from megalite.checkpoint.load import Checkpoint
from megalite.checkpoint.save import write
from megalite.system.errors import error_message
from tests.checkpoint.helpers import ALONE, FILE_OPERATIONS, names_in, whole


def save(
    root, iteration: int, lease: Lease, value: float = 1.0, meanwhile=lambda: None, keep_last=None
) -> Path:
    """Write a checkpoint; `meanwhile` runs while its tensors are written."""

    def shards():
        yield whole("w", torch.full((2,), value))
        meanwhile()

    return write(root, iteration, shards(), {}, {}, "", ALONE, keep_last, lease=lease)


def test_the_latest_claim_counts(tmp_path):
    first = Lease.take(tmp_path / "c")
    save(tmp_path / "c", 1, first)
    second = Lease.take(tmp_path / "c")
    with pytest.raises(
        CheckpointError, match=r"now belongs to another run \(process \d+ on .*was replaced"
    ):
        save(tmp_path / "c", 2, first)
    save(tmp_path / "c", 2, second, 2.0)
    assert list_iterations(tmp_path / "c") == [1, 2]


def test_a_run_that_is_replaced_in_the_middle_of_a_save(tmp_path):
    """Its successor saves the same iteration meanwhile; that one stays."""
    first, taken = Lease.take(tmp_path), []

    def replace():
        taken.append(Lease.take(tmp_path))
        save(tmp_path, 1, taken[0], 2.0)

    with pytest.raises(CheckpointError, match="now belongs to another run"):
        save(tmp_path, 1, first, 1.0, meanwhile=replace)
    with Checkpoint.open(tmp_path) as checkpoint:
        checkpoint.verify()
        assert checkpoint.read("w").tolist() == [2.0, 2.0]
    assert names_in(tmp_path) == ["iter_0000001", LATEST_FILE]


class Suspended:
    """A run in a thread, which can be stopped just before any of its file operations. One for each
    process, since an audit hook stays."""

    def __init__(self):
        self.thread, self.at, self.stops, self.goes_on = None, 0, Semaphore(0), Semaphore(0)
        self.stays, self.lost = Path(), False
        sys.addaudithook(self._count)

    def _count(self, event: str, _) -> None:
        if event in FILE_OPERATIONS and current_thread() is self.thread:
            self.at -= 1
            if self.at == 0:
                self.stops.release()
                self.goes_on.acquire()
            self.lost |= self.at < 0 and not self.stays.exists()

    def start(self, run: Callable[[], None], at: int) -> bool:
        """Run up to the file operation of number `at`; False: it has ended before."""

        def to_the_end():
            run()
            self.stops.release()

        self.thread, self.at, self.stays = Thread(target=to_the_end, daemon=True), at, Path()
        self.thread.start()
        self.stops.acquire()
        return self.at == 0

    def go_on(self, stays: Path) -> None:
        """Let it run to its end. The file `stays` has to be there all the time."""
        self.stays = stays
        self.goes_on.release()
        self.stops.acquire()
        assert not self.lost


def replace_at_each_operation(folder: Path, old_iteration: int, new_iteration: int) -> int:
    """A run claims a folder, saves and leaves its mark, but is suspended at some file operation; it
    goes on while its successor, which has saved once, saves again. For each operation. Returns how
    many there were."""
    suspended = Suspended()
    for at in itertools.count(1):
        root, ends = folder / str(at), []
        before = Lease.take(root)
        for iteration in (10, 20):
            save(root, iteration, before, 0.0)

        def old_run(root=root, ends=ends):
            try:
                lease = Lease.take(root)
                save(root, old_iteration, lease, 1.0, keep_last=1)
                lease.request_requeue("its time is over")
                ends.append("well")
            except Exception as error:
                ends.append(error)

        if not suspended.start(old_run, at):
            assert ends == ["well"] and latest_iteration(root) == old_iteration
            return at - 1
        if json.loads((root / "owner.json").read_text())["token"] == before.token:
            suspended.go_on(
                root
            )  # it has not begun to replace anyone: who claims now comes before it
            continue
        successor = Lease.take(root)
        saved = save(root, new_iteration, successor, 2.0)
        successor.request_requeue("the successor's")

        def go_on_and_look(root=root, saved=saved):
            suspended.go_on(saved / INDEX_FILE)
            assert (root / CONTINUE_FILE).read_text() == "the successor's\n"
            with Checkpoint.open(root) as checkpoint:
                checkpoint.verify()
                assert (checkpoint.iteration, checkpoint.read("w").tolist()) == (
                    new_iteration,
                    [2.0, 2.0],
                )

        save(root, new_iteration + 1, successor, 3.0, meanwhile=go_on_and_look)
        with Checkpoint.open(root) as checkpoint:
            checkpoint.verify()
            assert (checkpoint.iteration, checkpoint.read("w").tolist()) == (
                new_iteration + 1,
                [3.0, 3.0],
            )
        assert isinstance(ends[0], CheckpointError) and "now belongs to another run" in str(
            ends[0]
        ), (at, ends)
        names_in(root)  # which sees that nothing half-done is left


@pytest.mark.parametrize(("old", "new"), [(30, 40), (30, 30), (30, 20), (20, 20)])
def test_a_run_that_is_replaced_at_any_operation_changes_nothing_any_more(
    tmp_path, forkserver, old, new
):
    """The successor saves a later checkpoint, the same one, one that the old run was about to
    delete, one that it was about to move aside."""
    with ProcessPoolExecutor(1, forkserver) as process:
        operations = process.submit(replace_at_each_operation, tmp_path, old, new).result()
    assert operations > 30


def test_of_runs_that_claim_at_once_one_is_the_owner(tmp_path):
    start, claims = Barrier(8), []

    def lease():
        start.wait()
        with suppress(CheckpointError):
            claims.append(Lease.take(tmp_path))

    for _ in range(5):
        runs = [Thread(target=lease) for _ in range(8)]
        for run in runs:
            run.start()
        for run in runs:
            run.join()
        saved = []
        for number, claim_of_one in enumerate(claims, 1):
            with suppress(CheckpointError):
                save(tmp_path, number, claim_of_one)
                saved.append(number)
        assert len(saved) == 1 and latest_iteration(tmp_path) == saved[0]
        claims.clear()


def test_a_full_disk_while_the_lease_is_taken(tmp_path):
    """The error names the file, the limit and a remedy; the draft is removed, and the folder's
    owner stays."""
    first = Lease.take(tmp_path)
    before = names_in(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))  # stands for a full disk
    try:
        with pytest.raises(OSError, match="owner.json") as caught:
            Lease.take(tmp_path)
        message = error_message(caught.value)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert message.startswith(f"{tmp_path}/.owner.json.") and "10 B, which ulimit -f" in message
    assert names_in(tmp_path) == before
    first.check()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_at_the_request_for_a_requeue(tmp_path):
    lease = Lease.take(tmp_path)
    draft = lease.staging_dir / CONTINUE_FILE
    draft.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device") as caught:
        lease.request_requeue("its time is over")
    message = error_message(caught.value)
    assert message.startswith(f"{draft}: No space left on device") and "another disk" in message
    assert names_in(tmp_path) == []


def test_a_claim_clears_the_mark_of_a_run_that_stopped(tmp_path):
    Lease.take(tmp_path).request_requeue("stopped at iteration 3: SIGUSR1")
    assert (tmp_path / CONTINUE_FILE).read_text() == "stopped at iteration 3: SIGUSR1\n"
    Lease.take(tmp_path)
    assert not (tmp_path / CONTINUE_FILE).exists()
