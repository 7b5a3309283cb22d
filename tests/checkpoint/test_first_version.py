"""A checkpoint of the first version is read, and training continues with the numbers that the first
version gave."""

import json
from pathlib import Path

import pytest

from megalite.checkpoint.load import Checkpoint
from megalite.config import cli, validate
from megalite.training.pretrain import pretrain

FIRST_VERSION = Path(__file__).parents[1] / "data" / "checkpoint_v1"
FLAGS = """
    --num-layers 2 --hidden-size 16 --num-attention-heads 4 --num-query-groups 2 --seq-length 16
    --vocab-size 61 --make-vocab-size-divisible-by 8 --mock-data --micro-batch-size 2
    --global-batch-size 8 --lr 0.01 --lr-warmup-iters 2 --min-lr 0 --train-iters 8 --eval-interval 0
    --eval-iters 0 --device cpu --precision fp64
""".split()
LOSSES = [3.9894163721508664, 3.9647683477011397, 3.9382745261321737, 3.9447804088224308]
NORMS = [0.8987106051144641, 1.0676984899391448, 0.8472981549960408, 0.84158369760978]


def continue_on_rank(launch, load: str, metrics_file: str, layout: list[str]) -> None:
    flags = [*FLAGS, *layout, "--load", load, "--metrics-file", metrics_file]
    config = cli.read_config(flags)
    assert validate.check(config, launch.world_size) == []
    pretrain(validate.resolve(config, launch.world_size), launch)


@pytest.mark.parametrize(
    ("ranks", "layout"), [(1, []), (8, ["--tp", "2", "--pp", "2", "--sp"])], ids=["1", "8"]
)
def test_training_continues_with_the_numbers_of_the_first_version(pool, tmp_path, ranks, layout):
    """In fp64, from fp32 master weights and moments: equal in any layout but for rounding in
    fp64."""
    metrics = tmp_path / "metrics.jsonl"
    arguments = (str(FIRST_VERSION), str(metrics), layout)
    pool.run(continue_on_rank, ranks, *arguments, timeout=120)
    steps = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [step["iteration"] for step in steps] == [5, 6, 7, 8]
    assert [step["loss"] for step in steps] == pytest.approx(LOSSES, rel=1e-9)
    assert [step["grad_norm"] for step in steps] == pytest.approx(NORMS, rel=1e-9)


def test_every_file_of_it_is_intact():
    with Checkpoint.open(FIRST_VERSION) as checkpoint:
        assert checkpoint.iteration == 4
        assert "optimizer.exp_avg.layers.1.mlp.up.weight" in checkpoint.names
        assert "optimizer.master.embedding.word_embeddings.weight" in checkpoint.names
        checkpoint.verify()
