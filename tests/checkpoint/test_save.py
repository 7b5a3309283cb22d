"""The commit: what does not fit together is refused, what exists is kept, what is old goes only
afterwards."""

import errno
import os
import sys
import threading
import time
import weakref
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megalite.checkpoint.folder import CheckpointError, latest_iteration, list_iterations
from megalite.checkpoint.format import DeferredTensor, Shard
from megalite.checkpoint.load import Checkpoint
from megalite.checkpoint.save import write
from megalite.checkpoint.tensor_file import write_tensors
from megalite.parallel.boxes import Box
from tests.checkpoint.helpers import ALONE, cut, names_in, part, save, whole

LATEST = "latest_checkpointed_iteration.txt"
TENSOR = torch.arange(24.0).reshape(4, 6)
TOP, BOTTOM = cut((4, 6), 0, 2)


def value_at(root, step=None):
    return Checkpoint.open(root, step).read("w").item()


def scalar(value):
    return whole("w", torch.tensor(float(value)))


@pytest.mark.parametrize(
    ("shards", "text"),
    [
        ([part("w", TENSOR, TOP)], "w: only 12 of the 24 elements"),
        ([part("w", TENSOR, TOP), part("w", TENSOR, TOP)], "w: .* overlap"),
        ([part("w", TENSOR, TOP), part("w", TENSOR, Box((1, 0), (2, 6)))], "w: .* overlap"),
        ([part("w", TENSOR, Box((4, 0), (0, 6)))], "w: only 0 of the 24 elements"),
        (
            [whole("w", TENSOR), whole("c", torch.ones(2, dtype=torch.complex64))],
            "complex64 cannot be stored",
        ),
    ],
    ids=["uncovered", "twice", "overlapping", "all empty", "dtype"],
)
def test_shards_that_do_not_fit_are_refused_before_the_commit(tmp_path, shards, text):
    save(tmp_path, 1, scalar(1))
    with pytest.raises(CheckpointError, match=text):
        save(tmp_path, 2, *shards)
    assert names_in(tmp_path) == ["iter_0000001", LATEST]
    assert value_at(tmp_path) == 1


def test_a_shard_checks_itself():
    for name, shape, box in [
        ("w", (4, 6), BOTTOM),
        ("w", (1, 6), TOP),
        ("w", (4, 6, 1), TOP),
        ("a@b", (4, 6), TOP),
    ]:
        tensor = TENSOR[:2] if box == TOP else TENSOR
        with pytest.raises(ValueError, match=name):
            Shard(name, tensor, shape, box)


def test_state_that_json_cannot_hold_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"rank 0: TypeError: .*not JSON serializable"):
        save(tmp_path, 1, scalar(1), state={"lr": torch.ones(1)})
    assert names_in(tmp_path) == []


def test_shards_may_come_from_a_generator_that_fails(tmp_path):
    def shards():
        yield scalar(1)
        raise MemoryError("no room for the next copy")

    with pytest.raises(CheckpointError, match="rank 0: MemoryError: no room"):
        write(tmp_path, 1, shards(), {}, {}, "", ALONE)
    assert names_in(tmp_path) == []


def test_a_full_disk_is_named_and_the_previous_checkpoint_stays(tmp_path):
    save(tmp_path, 1, scalar(1))

    def shards():
        """The file that is written next leads to a device that is always full."""
        (draft,) = tmp_path.glob(".writing.*/iter_0000002")
        (draft / "weights-00000.safetensors").symlink_to("/dev/full")
        yield scalar(2)

    with pytest.raises(CheckpointError) as caught:
        write(tmp_path, 2, shards(), {}, {}, "", ALONE)
    text = str(caught.value)
    assert "iter_0000002/weights-00000.safetensors: No space left on device: " in text
    assert "are free on the file system of" in text and "write to another disk" in text
    assert names_in(tmp_path) == ["iter_0000001", LATEST]
    assert value_at(tmp_path) == 1


def deferred(alive: list, shape=(2048, 1024)) -> dict[str, DeferredTensor]:
    """Tensors w0 to w4 that are read when they are written: each holds its number. Notes in `alive`
    how many are in memory when one has been read."""
    arrays: weakref.WeakValueDictionary = weakref.WeakValueDictionary()

    def read(number: int) -> torch.Tensor:
        arrays[number] = array = np.full(shape, number, np.float32)
        alive.append(len(arrays))
        return torch.from_numpy(array)

    return {f"w{n}": DeferredTensor(torch.float32, shape, partial(read, n)) for n in range(5)}


def test_deferred_tensors_are_read_ahead_and_two_are_in_memory(tmp_path):
    alive = []
    write_tensors(tmp_path / "file.safetensors", deferred(alive))
    found = load_file(tmp_path / "file.safetensors")
    assert [int(found[f"w{n}"].unique()) for n in range(5)] == list(range(5))
    assert max(alive) == 2


def test_a_deferred_tensor_that_cannot_be_read_fails_the_write(tmp_path):
    tensors = deferred([])
    tensors["w3"] = DeferredTensor(torch.float32, (2, 2), lambda: torch.zeros(3))
    with pytest.raises(ValueError, match="announced as .*2, 2.* and read as .*3,"):
        write_tensors(tmp_path / "file.safetensors", tensors)


def test_a_write_that_fails_waits_for_what_is_being_read():
    began, ended = threading.Event(), threading.Event()

    def slow() -> torch.Tensor:
        began.set()
        time.sleep(0.2)
        ended.set()
        return torch.zeros(4)

    tensors = deferred([])
    tensors["w1"] = DeferredTensor(torch.float32, (4,), slow)
    with pytest.raises(OSError, match="No space left on device.*/dev/full"):
        write_tensors(Path("/dev/full"), tensors)
    assert began.is_set() and ended.is_set()


def test_keep_last_removes_the_oldest_after_the_commit(tmp_path):
    for iteration in (10, 20, 30, 40):
        save(tmp_path, iteration, scalar(iteration))
    save(tmp_path, 50, scalar(50), keep_last=3)
    assert names_in(tmp_path) == ["iter_0000030", "iter_0000040", "iter_0000050", LATEST]
    with pytest.raises(CheckpointError, match="keep_last must be at least 1"):
        save(tmp_path, 60, scalar(60), keep_last=0)
    assert list_iterations(tmp_path) == [30, 40, 50]


def test_keep_every_keeps_multiples_beside_the_last(tmp_path):
    for iteration in range(10, 80, 10):
        save(tmp_path, iteration, scalar(iteration), keep_last=2, keep_every=30)
    assert list_iterations(tmp_path) == [30, 60, 70]
    save(tmp_path, 80, scalar(80), keep_every=30)
    assert list_iterations(tmp_path) == [30, 60, 80]
    with pytest.raises(CheckpointError, match="keep_every must be at least 1"):
        save(tmp_path, 90, scalar(90), keep_every=0)


def test_keep_last_counts_and_removes_only_what_the_run_passed_through(tmp_path):
    """Saved 10 to 16, resumed from 12, wrote 15: 14 and 16 are of the abandoned branch."""
    for iteration in (10, 12, 14, 15, 16):
        save(tmp_path, iteration, scalar(iteration))
    save(tmp_path, 17, scalar(17), keep_last=2, history=[10, 12, 15])
    assert list_iterations(tmp_path) == [14, 15, 16, 17]
    save(tmp_path, 18, scalar(18), keep_last=1, history=[])
    assert list_iterations(tmp_path) == [14, 15, 16, 17, 18]


def test_keep_last_spares_a_later_branch_replaced_folders_and_what_is_not_ours(tmp_path):
    for iteration in (10, 20, 30, 40):
        save(tmp_path, iteration, scalar(iteration))
    foreign = tmp_path / "iter_0000001" / "mp_rank_00"
    foreign.mkdir(parents=True)
    save(tmp_path, 20, scalar(21), keep_last=1)  # as if resumed from 10
    expected = [
        "iter_0000001",
        "iter_0000020",
        "iter_0000020.replaced-1",
        "iter_0000030",
        "iter_0000040",
        LATEST,
    ]
    assert names_in(tmp_path) == expected
    assert value_at(tmp_path) == 21
    assert foreign.is_dir()


def test_an_existing_folder_is_moved_aside_and_named(tmp_path, capsys):
    for value in (1, 2, 3):
        save(tmp_path, 10, scalar(value))
    save(tmp_path, 20, scalar(4))
    assert names_in(tmp_path)[:3] == [
        "iter_0000010",
        "iter_0000010.replaced-1",
        "iter_0000010.replaced-2",
    ]
    assert value_at(tmp_path, step=10) == 3
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines] == [
        "iter_0000010.replaced-1",
        "iter_0000010.replaced-2",
    ]


def test_a_kill_between_moving_aside_and_moving_in_loses_nothing(tmp_path):
    for value in range(12):
        save(tmp_path, 10, scalar(value))
    os.rename(
        tmp_path / "iter_0000010", tmp_path / "iter_0000010.replaced-12"
    )  # what such a kill leaves
    assert latest_iteration(tmp_path) == 10
    assert value_at(tmp_path) == 11
    save(tmp_path, 10, scalar(12))
    assert value_at(tmp_path) == 12
    assert len(names_in(tmp_path)) == 14


def save_where_moving_in_fails(root):
    def fail(event, args):
        if event == "os.rename" and args[1] == str(root / "iter_0000010"):
            raise OSError(errno.EIO, "the disk is tired")

    sys.addaudithook(fail)
    save(root, 10, scalar(2))


def test_what_was_moved_aside_comes_back_when_the_new_one_cannot_be_moved_in(tmp_path, forkserver):
    save(tmp_path, 10, scalar(1))
    with (
        ProcessPoolExecutor(1, forkserver) as process,
        pytest.raises(CheckpointError, match="the disk is tired"),
    ):
        process.submit(save_where_moving_in_fails, tmp_path).result()
    assert names_in(tmp_path) == ["iter_0000010", LATEST]
    assert value_at(tmp_path) == 1


def test_what_killed_runs_left_is_cleaned_by_the_next(tmp_path):
    draft = tmp_path / ".writing.killed" / "iter_0000003"
    draft.mkdir(parents=True)
    (draft / "weights-00000.safetensors").write_bytes(b"half")
    (draft.parent / LATEST).write_text("9")
    assert list_iterations(tmp_path) == []
    save(tmp_path, 3, scalar(3))
    assert names_in(tmp_path) == ["iter_0000003", LATEST]


def test_a_failed_commit_leaves_the_latest(tmp_path):
    save(tmp_path, 1, scalar(1))
    (tmp_path / LATEST).rename(tmp_path / "kept")
    (tmp_path / LATEST).mkdir()  # cannot be replaced by a file
    with pytest.raises(CheckpointError, match="rank 0: IsADirectoryError"):
        save(tmp_path, 2, scalar(2))
    (tmp_path / LATEST).rmdir()
    (tmp_path / "kept").rename(tmp_path / LATEST)
    assert value_at(tmp_path) == 1
    save(tmp_path, 2, scalar(3))
    assert value_at(tmp_path) == 3
