"""A bad step is skipped on all ranks, and says where it comes from."""

import io
import json
import re
from contextlib import redirect_stdout

import pytest
import torch

from megalite.config.run import from_flat
from megalite.config.validate import check, resolve
from megalite.training.bad_steps import BadStepError
from megalite.training.build import build_model
from megalite.training.pretrain import pretrain
from megalite.watch.watchdog import LostContact

FLAGS = dict(
    num_layers=4,
    hidden_size=32,
    num_attention_heads=4,
    seq_length=16,
    vocab_size=61,
    mock_data=True,
    micro_batch_size=2,
    global_batch_size=8,
    train_iters=6,
    lr=1e-2,
    hidden_dropout=0.0,
    attention_dropout=0.0,
    eval_interval=0,
    eval_iters=0,
    log_interval=1,
    device="cpu",
    precision="fp64",
)
SHARDED = dict(use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True)
BAD_SAMPLES = (21, 22)
"""Of iteration 3, which has samples 16 to 23."""


def poisoned(config, context, rng):
    """A stage whose last one makes the loss of some samples infinite: their gradients stay
    finite."""
    model = build_model(config, context, rng)

    def add_infinity(module, inputs, output):
        is_bad = any(sample in BAD_SAMPLES for sample in inputs[1].samples.tolist())
        return output + torch.inf if is_bad and module.is_last and module.training else output

    model.stages[-1].register_forward_hook(add_infinity)
    return model


def with_nan_gradients(config, context, rng):
    """A stage whose last one makes the gradients of some samples NaN: their losses stay finite."""
    model = build_model(config, context, rng)

    def poison(module, inputs, output):
        is_bad = any(sample in BAD_SAMPLES[:1] for sample in inputs[1].samples.tolist())
        if is_bad and module.is_last and module.training:
            output.register_hook(lambda gradient: gradient * torch.nan)

    model.stages[-1].register_forward_hook(poison)
    return model


def train(launch, flags: dict, model=poisoned) -> tuple[str, str]:
    """(what is printed, the error that ends the run)."""
    config = from_flat(FLAGS | flags)
    assert check(config, launch.world_size) == []
    resolved = resolve(config, launch.world_size)
    error = ""
    with redirect_stdout(io.StringIO()) as printed:
        try:
            pretrain(resolved, launch, model)
        except (BadStepError, LostContact) as raised:
            error = str(raised)
    return printed.getvalue(), error


def metrics_of(path) -> list[dict]:
    rows = []
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        rows.append({key: value for key, value in entry.items() if "second" not in key})
    return rows


def test_a_bad_step_is_skipped_alike_in_every_layout(pool, tmp_path):
    one = {"max_bad_steps": 1, "metrics_file": str(tmp_path / "one.jsonl")}
    eight = one | {"metrics_file": str(tmp_path / "eight.jsonl"), **SHARDED}
    sizes = dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    printed, error = pool.run(train, 1, one)[0]
    assert not error
    assert (
        "iteration 3 | bad step, not applied: the gradient norm is nan; the loss of samples "
        "20 to 21 on rank 0 is inf; the loss of samples 22 to 23 on rank 0 is inf\n"
    ) in printed
    ranks = pool.run(train, 8, eight | sizes | {"sequence_parallel": True})
    # Data rank 0 has samples 16, 17 and 20, 21; data rank 1 the others. Ranks 4 to 7 are the last
    # stage.
    assert (
        "iteration 3 | bad step, not applied: the gradient norm is nan; the loss of samples "
        "20 to 21 on rank 4 is inf; the loss of samples 22 to 23 on rank 6 is inf\n"
    ) in ranks[0][0]
    wanted = metrics_of(tmp_path / "one.jsonl")
    assert [row["skipped_steps"] for row in wanted] == [0, 0, 1, 1, 1, 1]
    assert ["loss" in row for row in wanted] == [row != 2 for row in range(6)]
    for row, other in zip(metrics_of(tmp_path / "eight.jsonl"), wanted, strict=True):
        assert row == pytest.approx(other, rel=1e-9)


def test_too_many_bad_steps_end_the_run(pool, tmp_path):
    ranks = pool.run(train, 2, {"save": str(tmp_path), "train_iters": 3, "micro_batch_size": 1})
    printed = ranks[0][0]
    # The first rank to report an error reports it for all.
    (error,) = filter(None, [message for _, message in ranks])
    assert error.startswith(
        "iteration 3: the gradient norm is nan. The run ends, since no bad step is skipped"
    )
    assert "a lower --lr" in error
    assert "iteration 3 | bad step, not applied" in printed
    assert (
        "the loss of sample 22 on rank 0 is inf; the loss of sample 21 on rank 1 is inf" in printed
    )


@pytest.mark.parametrize("flags", [{}, SHARDED], ids=["whole", "sharded"])
def test_a_bad_sum_of_gradients_blames_no_data_rank(pool, flags):
    """Sample 21 is on data rank 1, which the sum does not tell."""
    flags = flags | {"max_bad_steps": 1, "micro_batch_size": 1, "train_iters": 3}
    printed, error = pool.run(train, 2, flags, with_nan_gradients)[0]
    assert not error
    (line,) = [line for line in printed.splitlines() if "bad step" in line]
    summed = "summed over 2 data-parallel ranks, is not finite"
    assert re.search(rf"nan; on rank 0 the gradient of \S+\.weight and 5\d others, {summed}$", line)
