"""--check-replicas: a single flipped bit in one rank's copy of a parameter stops the run and is
named."""

import pytest
import torch

from megalite.config import cli, validate
from megalite.training.build import build_model
from megalite.training.pretrain import pretrain
from megalite.training.replicas import ReplicasDiffer, check_replicas
from megalite.watch.watchdog import LostContact
from tests.layouts import Layout, sp
from tests.tiny import build

RUN = """
    --mock-data --vocab-size 131 --num-layers 2 --hidden-size 32 --num-attention-heads 4
    --seq-length 16 --tp 2 --pp 2
    --sp --global-batch-size 4 --train-iters 4 --eval-interval 0 --device cpu --check-replicas 3
""".split()


def flip_bit(parameter: torch.Tensor) -> None:
    """Flip the lowest bit of one element."""
    with torch.no_grad():
        parameter.view(-1)[:1].view(torch.uint8)[0] ^= 1


def checked(launch, layout: Layout, rank: int, name: str) -> str:
    """What the check says after two steps, with a bit flipped in one rank's parameter ("": nothing
    is flipped)."""
    tiny = build(layout, launch, precision="bf16")
    tiny.train(2)
    tensors = dict(tiny.components.model.parameters_by_name)
    tensors |= {
        f"optimizer.{kind}.{name}": tensor
        for kind, name, tensor in tiny.components.optimizer.state()
    }
    if launch.rank == rank and name:
        flip_bit(tensors[name])
    try:
        check_replicas(tiny.components, 7)
    except ReplicasDiffer as error:
        return str(error)
    return ""


LAYOUT = Layout("2x2x2", dp=2, tp=2, pp=2, flags=sp())


@pytest.mark.parametrize(
    ("rank", "name", "holders"),
    [
        (1, "layers.0.mlp_norm.weight", "rank 1 differ(s) from the other 3 of ranks [0, 1, 2, 3]"),
        (6, "layers.3.mlp.down.bias", "rank 6 differ(s) from the other 3 of ranks [4, 5, 6, 7]"),
        (
            7,
            "embedding.word_embeddings.weight",
            "rank 7 differ(s) from the other 3 of ranks [1, 3, 5, 7]",
        ),
        (2, "layers.1.attention.qkv.weight", "ranks [0, 2] do not agree"),
        (
            5,
            "optimizer.master.final_norm.weight",
            "rank 5 differ(s) from the other 3 of ranks [4, 5, 6, 7]",
        ),
        (3, "optimizer.exp_avg_sq.layers.0.mlp.up.bias", "ranks [1, 3] do not agree"),
    ],
    ids=[
        "tp and dp replicas",
        "a bias",
        "tied embedding",
        "dp replicas only",
        "a master weight",
        "a moment",
    ],
)
def test_a_flipped_bit_is_found(pool, rank, name, holders):
    messages = pool.run(checked, 8, LAYOUT, rank, name)
    assert set(messages[1:]) == {"after iteration 7, replicas are not equal: see rank 0's message"}
    assert f"{name} at" in messages[0] and holders in messages[0]
    assert "after iteration 7, replicas of 1 shard" in messages[0]


def test_sound_replicas_pass(pool):
    assert set(pool.run(checked, 8, LAYOUT, 0, "")) == {""}
    assert set(pool.run(checked, 4, Layout("padding", tp=4), 0, "")) == {""}


def run_with_fault(launch, folder: str) -> str:
    """A run whose rank 5 is hit by a bit flip while it trains; what ends it, on the rank that says
    it for all."""

    def faulty(config, context, rng):
        model = build_model(config, context, rng)
        if launch.rank == 5:

            def flip_once(module, inputs):
                flip_bit(module.final_norm.weight)
                hook.remove()

            hook = model.stages[-1].register_forward_pre_hook(flip_once)
        return model

    config = cli.read_config(
        [*RUN, "--save", folder, "--save-interval", "2"]
    )  # the check is due at 3
    assert validate.check(config, launch.world_size) == []
    with pytest.raises((ReplicasDiffer, LostContact)) as caught:
        pretrain(validate.resolve(config, launch.world_size), launch, faulty)
    return str(caught.value)


def test_a_run_stops_before_it_saves(pool, tmp_path):
    said = "".join(pool.run(run_with_fault, 8, str(tmp_path / "c")))
    assert "after iteration 2" in said and "final_norm.weight" in said and "rank 5" in said
    assert not list(tmp_path.glob("c/iter_*"))
