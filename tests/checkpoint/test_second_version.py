"""A checkpoint in format version 2 is read, and training continues with the numbers of the version
that wrote it."""

import json
from pathlib import Path

import pytest

from megalite.checkpoint.load import Checkpoint
from megalite.config import cli, validate
from megalite.training.pretrain import pretrain

SECOND_VERSION = Path(__file__).parents[1] / "data" / "checkpoint_v2"
FLAGS = """
    --num-layers 1 --hidden-size 8 --num-attention-heads 4 --num-query-groups 2 --seq-length 8
    --vocab-size 21 --make-vocab-size-divisible-by 4 --mock-data --micro-batch-size 2
    --global-batch-size 4 --lr 0.01 --lr-warmup-iters 2 --min-lr 0 --train-iters 6 --eval-interval 0
    --eval-iters 0 --device cpu --precision fp64 --swiglu --hidden-dropout 0 --attention-dropout 0
""".split()
LOSSES = [3.0210259671612234, 3.0530717504527773, 3.046067241285834]
NORMS = [0.6533490227083211, 0.885695573551549, 0.7044166511348615]


def continue_training(launch, metrics_file: str) -> None:
    flags = [*FLAGS, "--load", str(SECOND_VERSION), "--metrics-file", metrics_file]
    config = cli.read_config(flags)
    assert validate.check(config, launch.world_size) == []
    pretrain(validate.resolve(config, launch.world_size), launch)


def test_training_continues_with_the_numbers_of_the_second_version(pool, tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    pool.run(continue_training, 1, str(metrics), timeout=120)
    steps = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [step["iteration"] for step in steps] == [4, 5, 6]
    assert [step["loss"] for step in steps] == pytest.approx(LOSSES, rel=1e-9)
    assert [step["grad_norm"] for step in steps] == pytest.approx(NORMS, rel=1e-9)


def test_every_file_of_it_is_intact():
    with Checkpoint.open(SECOND_VERSION) as checkpoint:
        assert (checkpoint.iteration, checkpoint.world_size) == (3, 4)
        assert "optimizer.master.layers.0.mlp.up.weight" in checkpoint.names
        assert checkpoint.private(3, 4).keys() == {"rng.replicated", "rng.tensor"}
        checkpoint.verify()
