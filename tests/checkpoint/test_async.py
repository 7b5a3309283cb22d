"""Asynchronous saves: the same checkpoint as a synchronous one, written while training goes on."""

import resource
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from megalite.checkpoint.background import AsyncSaver, HostCopies
from megalite.checkpoint.folder import CheckpointError
from megalite.checkpoint.load import Checkpoint
from megalite.checkpoint.save import write
from megalite.config import cli, validate
from megalite.training.build import build_model
from megalite.training.failures import explain
from megalite.training.pretrain import pretrain
from tests.checkpoint.helpers import ALONE, names_in, save, whole
from tests.test_resume import FP16, MODEL, SHARDED, curve, pretrain_on_rank, train

LATEST = "latest_checkpointed_iteration.txt"


@contextmanager
def slow_disk(seconds: float):
    """The thread of an asynchronous save takes so long to open the file of its rank's tensors."""
    armed = threading.Event()
    armed.set()

    def wait(event, arguments):
        if event == "open" and armed.is_set() and threading.current_thread().name == "save":
            if str(arguments[0]).endswith(".safetensors"):
                time.sleep(seconds)

    sys.addaudithook(wait)  # nothing removes it
    try:
        yield
    finally:
        armed.clear()


def pretrain_with_slow_disk(launch, flags: list[str]) -> str:
    """A training in which rank 1's disk is slow; what rank 0 printed."""
    with slow_disk(1.2 if launch.rank == 1 else 0):
        return pretrain_on_rank(launch, flags)


def test_it_is_the_checkpoint_of_its_moment_though_training_goes_on(pool, tmp_path):
    """In fp16 with a sharded optimizer. The threads wait for rank 1's disk for longer than a hang
    may take, while the ranks train; the next save, and the end of the run, wait for the threads."""
    layout = ["--pp", "2", *SHARDED, *FP16, "--save-interval", "6", "--train-iters", "14"]
    layout += ["--check-replicas", "7", "--rng-scheme", "megatron", "--log-communication"]
    flags = [*layout, "--save", tmp_path / "stopped", "--metrics-file", tmp_path / "stopped.jsonl"]
    train(pool, 4, *flags)
    flags = [*layout, "--save", tmp_path / "async", "--metrics-file", tmp_path / "async.jsonl"]
    flags += ["--async-save", "--hang-timeout", "1"]
    said = pool.run(pretrain_with_slow_disk, 4, list(map(str, flags)), timeout=120)[0]

    assert curve(tmp_path / "async.jsonl") == curve(tmp_path / "stopped.jsonl")
    folders = [f"iter_{iteration:07d}" for iteration in (6, 12, 14)]
    for folder in folders:
        for rank in range(4):
            file = f"{folder}/weights-{rank:05d}.safetensors"
            wanted = (tmp_path / "stopped" / file).read_bytes()
            assert (tmp_path / "async" / file).read_bytes() == wanted
        states = [Checkpoint.open(tmp_path / run / folder).state for run in ("async", "stopped")]
        assert states[0] == states[1]
    # Training went on: the validation after iteration 8 came before the end of the first save.
    assert "saving" not in said  # the thread's calls are no traffic of the training
    lines = [line for line in said.splitlines() if "validation" in line or "saved" in line]
    first_save = next(number for number, line in enumerate(lines) if "at iteration 6 in" in line)
    assert "iteration 8 | validation" in lines[first_save - 1]
    assert [line for line in lines if "saved" in line][-1].startswith(
        f"saved {tmp_path}/async at iteration 14 in 1."
    )


def pretrain_until_the_disk_is_full(launch, flags: list[str]) -> str | None:
    """The message with which a rank ends. A limit on the size of rank 1's files, from sample 40 on,
    stands for a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def building(*arguments):
        model = build_model(*arguments)
        if launch.rank == 1:
            model.stages[0].register_forward_pre_hook(fill_disk)
        return model

    def fill_disk(module, inputs):
        if inputs[1].samples[0] >= 40:
            resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))

    try:
        config = cli.read_config([*MODEL, *flags])
        pretrain(validate.resolve(config, launch.world_size), launch, building)
    except Exception as error:
        return explain(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_an_error_ends_all_ranks_at_the_next_step(pool, tmp_path):
    flags = ["--train-iters", "1000", "--save", tmp_path / "c", "--save-interval", "4"]
    flags += ["--async-save", "--metrics-file", tmp_path / "m.jsonl", "--eval-interval", "0"]
    flags += ["--eval-iters", "0", "--use-distributed-optimizer"]
    messages = pool.run(pretrain_until_the_disk_is_full, 2, list(map(str, flags)), timeout=60)
    # Rank 0's thread has written its file: it learns of the failure from rank 1's. (The limit also
    # keeps rank 1 from telling, through the pool's store, that both end for the same reason.)
    for message in messages:
        assert (
            "checkpoint not written; rank 1: OSError: " in message and "File too large" in message
        )
    assert max(row["iteration"] for row in curve(tmp_path / "m.jsonl")) < 100
    assert [path.name for path in (tmp_path / "c").glob("iter_*")] == ["iter_0000004"]
    Checkpoint.open(tmp_path / "c").verify()


def test_copies_are_dense_and_in_the_same_memory_each_time():
    copies = HostCopies()
    copies.reserve([torch.empty(50)])
    whole_tensor = torch.randn(6, 5)
    tensors = [
        whole_tensor[1:4, 2:],  # no dense view
        torch.tensor([float("nan"), -0.0], dtype=torch.bfloat16),
        torch.empty(0, 3),
        torch.tensor(7, dtype=torch.int64),
        torch.tensor([True, False, True]),
    ]
    kept = [tensor.clone() for tensor in tensors]
    first = copies.copy(tensors)
    whole_tensor.zero_()
    for copy, tensor in zip(first, kept, strict=True):
        assert copy.dtype == tensor.dtype and copy.shape == tensor.shape and copy.is_contiguous()
        assert copy.view(-1).view(torch.uint8).equal(tensor.contiguous().view(-1).view(torch.uint8))
    again = copies.copy([torch.ones(3), *tensors[1:]])
    assert again[0].data_ptr() == first[0].data_ptr() and again[0].tolist() == [1, 1, 1]
    assert copies.copy([torch.arange(10_000)])[0][-1] == 9_999


def test_a_save_is_waited_for_and_its_failure_raised():
    saver = AsyncSaver()
    assert not (saver.is_pending or saver.is_running or saver.has_failed)
    go_on = threading.Event()
    saver.start(3, [], {}, lambda shards, private: go_on.wait())
    assert saver.is_pending and saver.is_running and not saver.has_failed
    with pytest.raises(ValueError, match="has not been waited for"):
        saver.start(4, [], {}, lambda shards, private: None)
    with pytest.raises(TimeoutError):
        saver.finish(timeout=0.01)
    assert saver.is_pending
    go_on.set()
    times = saver.finish()
    assert times.iteration == 3 and 0.01 <= times.blocked_seconds <= times.seconds + 0.01
    assert not saver.is_pending

    def fail(shards, private):
        raise OSError("disk")

    saver.start(5, [], {}, fail)
    with pytest.raises(OSError, match="disk"):
        saver.finish()
    assert not saver.is_pending
    saver.close()


def test_what_cannot_be_copied_fails_where_the_other_ranks_learn_of_it(tmp_path: Path):
    save(tmp_path, 1, whole("w", torch.ones(2)))
    saver = AsyncSaver()
    shards = [whole("w", torch.ones(2, device="meta"))]
    saver.start(2, shards, {}, lambda s, private: write(tmp_path, 2, s, private, {}, "", ALONE))
    with pytest.raises(CheckpointError, match="not written; rank 0: NotImplementedError: .*meta"):
        saver.finish()
    assert names_in(tmp_path) == ["iter_0000001", LATEST]
