"""The loss scale: how it falls and rises, and what a step that overflows leaves alone."""

import pytest
import torch

from megalite.optim.config import OptimizerConfig
from megalite.optim.loss_scale import LossScale
from tests.layouts import Layout
from tests.tiny import build

SCALES = {
    "initial_loss_scale": 64.0,
    "min_loss_scale": 8.0,
    "loss_scale_window": 3,
    "hysteresis": 2,
}
SHARDED = {"use_distributed_optimizer": True, "overlap_param_gather": True}


def scales_after(scale: LossScale, outcomes: str) -> list[float]:
    """The scale after each step: "-" overflows, "+" does not."""
    values = []
    for outcome in outcomes:
        scale.update(outcome == "-")
        values.append(scale.value)
    return values


def test_the_scale_falls_after_overflows_and_rises_after_a_time_without():
    scale = LossScale.from_config(OptimizerConfig(precision="fp16", **SCALES))
    # The first overflow is forgiven, the next ones are not, down to the minimum.
    assert scales_after(scale, "-----") == [64, 32, 16, 8, 8]
    # Three steps without, in a row.
    assert scales_after(scale, "++-+++") == [8, 8, 8, 8, 8, 16]
    # Once it has risen, one overflow is forgiven again.
    assert scales_after(scale, "--") == [16, 8]


def test_a_constant_scale_and_none():
    constant = LossScale.from_config(OptimizerConfig(precision="fp16", loss_scale=100.0))
    assert scales_after(constant, "-+-") == [100, 100, 100] and not constant.can_fall
    none = LossScale.from_config(OptimizerConfig(precision="bf16"))
    assert scales_after(none, "-+-") == [1, 1, 1] and not none.can_fall


def test_a_restored_scale_continues():
    config = OptimizerConfig(precision="fp16", **SCALES)
    first, second = LossScale.from_config(config), LossScale.from_config(config)
    scales_after(first, "--+")
    second.restore(first.state())
    assert scales_after(first, "+++--") == scales_after(second, "+++--")


def test_a_scale_that_was_constant_starts_by_its_flags():
    constant = LossScale.from_config(OptimizerConfig(precision="fp16", loss_scale=1024.0))
    adapting = LossScale.from_config(OptimizerConfig(precision="fp16", **SCALES))
    adapting.restore(constant.state())
    assert scales_after(adapting, "--") == [64, 32]


def test_a_restored_scale_of_one_goes_on_counting():
    config = OptimizerConfig(precision="fp16", initial_loss_scale=1.0, loss_scale_window=4)
    first, second = LossScale.from_config(config), LossScale.from_config(config)
    scales_after(first, "++")
    second.restore(first.state())
    assert scales_after(second, "++") == [1, 2]


def overflow_on_rank_1(launch, flags: dict) -> tuple[list, bool, list, int]:
    """Two steps with an overflow in what rank 1 alone updates, then one without."""
    tiny = build(Layout("dp2", dp=2), launch, fp16=True, **SCALES, **flags)
    optimizer = tiny.components.optimizer
    parameters = tiny.components.model.parameters_by_name
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    skipped = []
    for iteration in (1, 2):
        tiny.gradient()
        if launch.rank == 1:
            optimizer.gradients.flat[-40] = float("inf")
        skipped.append(optimizer.step(iteration))
    unchanged = all(torch.equal(parameters[name], before[name]) for name in before)
    good = tiny.train(3)
    optimizer.wait_for_parameters()
    changed = [name for name in before if not torch.equal(parameters[name], before[name])]
    return [*skipped, good], unchanged, changed, optimizer.steps


@pytest.mark.parametrize("flags", [{}, SHARDED], ids=["plain", "sharded"])
def test_an_overflow_on_one_rank_skips_the_step_on_all(pool, flags):
    ranks = pool.run(overflow_on_rank_1, 2, flags)
    for results, unchanged, changed, steps in ranks:
        assert [result.skipped for result in results] == [True, True, False]
        assert [result.loss_scale for result in results] == [64, 64, 32]
        assert unchanged and len(changed) > 10 and steps == 1
        assert 0 < results[2].gradient_norm < 100


def test_the_scale_changes_no_gradient():
    """In fp64 a power of two is exact: norm and weights are those of a run without it."""
    plain = build(lr=1e-2)
    scaled = build(lr=1e-2)
    scaled.components.optimizer.loss_scale = LossScale(value=2.0**20)
    for iteration in (1, 2):
        one, other = plain.train(iteration), scaled.train(iteration)
        assert other.gradient_norm == pytest.approx(one.gradient_norm, rel=1e-12)
        assert other.loss_scale == 2**20
    weights = scaled.components.model.parameters_by_name
    for name, parameter in plain.components.model.parameters_by_name.items():
        torch.testing.assert_close(weights[name], parameter, rtol=0, atol=1e-7)


def test_an_overflow_at_the_smallest_scale_is_a_bad_step():
    tiny = build(fp16=True, **SCALES | {"initial_loss_scale": 8.0})
    tiny.gradient()
    tiny.components.optimizer.gradients.flat[0] = float("nan")
    assert tiny.components.optimizer.step(1).bad == "the gradient norm is nan"
