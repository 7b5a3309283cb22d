"""SIGKILL at random moments of a run that saves often: each restart resumes from a whole
checkpoint, and the run ends with the weights of one that nobody disturbed."""

import os
import random
import signal
import sys
import threading
from pathlib import Path

import pytest
import torch

from megalite.checkpoint.folder import latest_iteration, list_iterations
from megalite.checkpoint.load import Checkpoint
from megalite.config import cli, validate
from megalite.training.build import build_model
from megalite.training.pretrain import pretrain
from tests.pool import RanksFailed
from tests.test_resume import EIGHT_RANKS, FP16, MODEL, RAMP, SHARDED, curve, resumable, train

SEED = 16
KILLS = 20
"""At random moments, of which few may lie in a save on a fast machine."""
KILLS_IN_SAVES = 5
SMALL = """
    --num-layers 2 --hidden-size 16 --num-attention-heads 2 --global-batch-size 4
    --train-iters 240 --eval-interval 0 --eval-iters 0
""".split()


def pretrain_until_killed(launch, flags: list[str], victims: list[int], after: int, delay: float):
    """Ranks in `victims` are killed `delay` seconds after their forward number `after`."""

    def count(*unused) -> None:
        nonlocal after
        after -= 1
        if after == 0:
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()

    def building(*arguments):
        model = build_model(*arguments)
        if launch.rank in victims:
            model.stages[0].register_forward_pre_hook(count)
        return model

    config = cli.read_config([*MODEL, *flags])
    pretrain(validate.resolve(config, launch.world_size), launch, building)


def require_whole_checkpoints(root: Path) -> None:
    """Whatever is there is whole, and the latest is one of them."""
    iterations = list_iterations(root, replaced=True)
    for iteration in iterations:
        with Checkpoint.open(root, iteration) as checkpoint:
            checkpoint.verify()
            assert checkpoint.iteration == checkpoint.state["iteration"] == iteration
    assert latest_iteration(root) in [*iterations, None]


def require_same_tensors(one: Path, other: Path) -> None:
    """The latest checkpoints of two folders hold the same bits."""
    with Checkpoint.open(one) as left, Checkpoint.open(other) as right:
        assert left.iteration == right.iteration
        assert left.names == right.names
        for name in left.names:
            bits = [source.read(name).flatten().view(torch.uint8) for source in (left, right)]
            assert torch.equal(*bits), name
        for key in ("consumed_samples", "optimizer_steps", "loss_scale", "data"):
            assert left.state[key] == right.state[key]


def test_two_ranks_are_killed_at_random_moments(pool, tmp_path):
    """Rank 0, rank 1 or both; every other run saves asynchronously. Each saves after every step.
    Every fifth kill is of one rank, as it opens its file in its first save."""
    run = [*SMALL, *SHARDED]
    train(pool, 2, *run, "--save", tmp_path / "whole")
    root = tmp_path / "killed"
    flags = [*run, "--save", root, "--load", root, "--keep-last", "3"]
    generator = random.Random(SEED)
    reached = killed_while_saving = 0
    for number in range(KILLS + KILLS_IN_SAVES):
        moment = (
            generator.choice([[0], [1], [0, 1]]),
            generator.randint(1, 12),
            generator.uniform(0, 0.06),
        )
        attempt = list(map(str, [*flags, "--save-interval", "1"]))
        in_save = number % 5 == 4
        if number % 2 or in_save:
            attempt.append("--async-save")
        with pytest.raises(RanksFailed, match="was killed by SIGKILL"):
            if in_save:
                victim = generator.choice([0, 1])
                pool.run(pretrain_until_killed_in_save, 2, attempt, victim, timeout=60)
            else:
                pool.run(pretrain_until_killed, 2, attempt, *moment, timeout=60)
        killed_while_saving += any(root.glob(".writing.*/*"))
        require_whole_checkpoints(root)
        assert (latest_iteration(root) or 0) >= reached
        reached = latest_iteration(root) or 0
    said = train(pool, 2, *flags)
    assert f"resumed from {root}/iter_{reached:07d} at iteration {reached}\n" in said
    assert killed_while_saving >= KILLS_IN_SAVES and reached > KILLS
    require_same_tensors(root, tmp_path / "whole")


def pretrain_until_killed_in_save(launch, flags: list[str], victim: int) -> None:
    """The victim is killed as the thread of its save opens the file for its tensors."""

    def kill(event, arguments) -> None:
        if event == "open" and threading.current_thread().name == "save":
            if str(arguments[0]).endswith(f"weights-{victim:05d}.safetensors"):
                os.kill(os.getpid(), signal.SIGKILL)

    if launch.rank == victim:
        sys.addaudithook(kill)
    config = cli.read_config([*MODEL, *flags])
    pretrain(validate.resolve(config, launch.world_size), launch)


def test_eight_ranks_are_killed_twice_and_resume_bit_exactly(pool, tmp_path):
    """dp=2 x tp=2 x pp=2, a sharded optimizer with overlap, in fp16, while the batch size grows:
    undisturbed, and killed in iteration 10, then in the save after iteration 12."""
    layout = [*EIGHT_RANKS, *SHARDED, *FP16, *RAMP]
    whole = [*layout, "--metrics-file", tmp_path / "whole.jsonl", "--save", tmp_path / "whole"]
    train(pool, 8, *whole)
    sizes = [row["global_batch_size"] for row in curve(tmp_path / "whole.jsonl") if "loss" in row]
    assert sizes == 5 * [4] + 4 * [6] + 3 * [8]

    flags = [*layout, *resumable(tmp_path), "--save-interval", "4"]
    # Of each replica's microbatches in the 9 iterations before, and in 2 evaluations.
    forwards = 5 * 2 + 4 * 3 + 2 * 4 + 1
    with pytest.raises(RanksFailed, match="rank 3 was killed by SIGKILL"):
        pool.run(pretrain_until_killed, 8, list(map(str, flags)), [3], forwards, 0.0, timeout=120)
    assert latest_iteration(tmp_path / "c") == 8
    flags += ["--async-save"]
    with pytest.raises(RanksFailed, match="rank 6 was killed by SIGKILL"):
        pool.run(pretrain_until_killed_in_save, 8, list(map(str, flags)), 6, timeout=120)
    assert latest_iteration(tmp_path / "c") == 8
    require_whole_checkpoints(tmp_path / "c")
    train(pool, 8, *flags)
    assert curve(tmp_path / "m.jsonl") == curve(tmp_path / "whole.jsonl")
    require_same_tensors(tmp_path / "c", tmp_path / "whole")
