"""Linear layers: which part a rank holds, the gradients, and their accumulation in `main_grad`."""

import pytest
import torch
from torch.nn.functional import linear

from megalite.nn.config import ModelConfig
from megalite.nn.linear import ColumnParallelLinear, RowParallelLinear, column_parallel_linear
from megalite.nn.weight_gradient import WeightGradients
from megalite.parallel.boxes import Box
from megalite.parallel.collectives import Group
from megalite.parallel.layout import ParallelLayout
from tests.tiny import settings_of

ALONE = Group((0,), 0)
MODEL = ModelConfig(init_method_std=0.1)


def random(*shape: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def gradients(y: torch.Tensor, *leaves: torch.Tensor) -> list[torch.Tensor]:
    return [y.detach(), *torch.autograd.grad(y, leaves, random(*y.shape, seed=9, dtype=y.dtype))]


@pytest.mark.parametrize("features", [(6,), (2, 6), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_column_parallel_is_torchs_linear(features, bias):
    x, weight = random(5, 2, 8).requires_grad_(), random(*features, 8, seed=1).requires_grad_()
    b = random(*features, seed=2).requires_grad_() if bias else None
    leaves = [x, weight, b] if bias else [x, weight]
    got = gradients(column_parallel_linear(x, weight, b, ALONE, False), *leaves)
    expected = gradients(linear(x, weight.view(-1, 8), b.view(-1) if bias else None), *leaves)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)


def test_row_parallel_is_torchs_linear_without_the_bias():
    layer = RowParallelLinear(settings_of(MODEL, dtype=torch.float64), 8, 5)
    with torch.no_grad():
        layer.weight.copy_(random(5, 8, seed=1))
        layer.bias.fill_(7)
    x = random(3, 2, 8).requires_grad_()
    got, expected = (gradients(y, x, layer.weight) for y in (layer(x), linear(x, layer.weight)))
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)


def test_main_grad_accumulates_in_place_of_grad():
    x, weight = random(5, 2, 8), random(2, 3, 8, seed=1).requires_grad_()
    bias = random(2, 3, seed=2).requires_grad_()
    WeightGradients().attach(weight, torch.ones_like(weight))
    for _ in range(2):
        column_parallel_linear(x, weight, bias, ALONE, False).sum().backward()
    assert weight.grad is None
    row = x.sum(dim=(0, 1))
    torch.testing.assert_close(weight.main_grad, 1 + 2 * row.expand(2, 3, 8))
    torch.testing.assert_close(bias.grad, torch.full((2, 3), 20.0, dtype=torch.float64))


def test_a_frozen_weight_gets_no_gradient():
    x, weight = random(5, 2, 8).requires_grad_(), random(6, 8, seed=1)
    weight.weight_gradients = WeightGradients()
    weight.main_grad = torch.zeros_like(weight)
    column_parallel_linear(x, weight, None, ALONE, False).sum().backward()
    assert not weight.main_grad.any()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(5, 2, 8))


def test_bf16_accumulates_over_microbatches_in_fp32():
    """Products of two bf16 numbers are exact in fp32, so all that is lost is in the K additions of
    each entry: at most K * 2^-24 of the sum of its terms' magnitudes (Higham, section 3.1). Sums
    rounded to bf16 would miss that far."""
    microbatches, rows = 32, 4
    weight = random(16, 12, seed=1, dtype=torch.bfloat16).requires_grad_()
    WeightGradients().attach(weight, torch.zeros(16, 12))
    exact, magnitude = torch.zeros(2, 16, 12, dtype=torch.float64)
    in_bf16 = torch.zeros_like(weight)
    for i in range(microbatches):
        x = random(rows, 1, 12, seed=i, dtype=torch.bfloat16)
        dy = random(rows, 1, 16, seed=-i - 1, dtype=torch.bfloat16)
        column_parallel_linear(x, weight, None, ALONE, False).backward(dy)
        a, b = dy.flatten(0, 1).t().double(), x.flatten(0, 1).double()
        exact += a @ b
        magnitude += a.abs() @ b.abs()
        in_bf16 = in_bf16 + dy.flatten(0, 1).t() @ x.flatten(0, 1)
    bound = microbatches * rows * 2.0**-24 * magnitude
    assert (weight.main_grad.double() - exact).abs().le(bound).all()
    assert ((in_bf16.double() - exact).abs() / bound).median() > 10


@pytest.mark.parametrize(
    ("features", "split_dim"), [((6,), 0), ((6, 3, 2), 0), ((2, 6), 1)], ids=str
)
def test_ranks_hold_boxes_that_make_up_the_weight(features, split_dim):
    layout = ParallelLayout(tensor=3)
    layers = [
        ColumnParallelLinear(settings_of(MODEL, layout, rank), 4, features, split_dim)
        for rank in range(3)
    ]
    for name, shape in (("weight", (*features, 4)), ("bias", features)):
        seen = torch.zeros(shape, dtype=torch.int)
        for layer in layers:
            parameter = getattr(layer, name)
            spec = parameter.spec
            assert spec.global_shape == shape and tuple(parameter.shape) == spec.box.shape
            assert spec.sharded == ("tensor", "pipeline") and spec.weight_decay == (
                name == "weight"
            )
            seen[spec.box.slices_in(Box.whole(shape))] += 1
        assert seen.eq(1).all()


def test_row_parallel_ranks_share_the_bias_and_split_the_inputs():
    layout = ParallelLayout(tensor=2)
    for sequence_parallel in (False, True):
        settings = settings_of(MODEL, layout, 1, sequence_parallel=sequence_parallel)
        layer = RowParallelLinear(settings, 6, 4)
        assert layer.weight.spec.box == Box((0, 3), (4, 3))
        assert layer.weight.spec.sharded == ("tensor", "pipeline")
        assert layer.bias.spec.box == Box.whole((4,)) and layer.bias.spec.sharded == ("pipeline",)
        # Under sequence parallelism each rank adds the bias to its part of the sequence only.
        assert layer.bias.spec.partial == (("tensor",) if sequence_parallel else ())
