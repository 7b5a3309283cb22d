"""The gradient buffer: what is summed over whom, what the norm counts, and clipping."""

from math import sqrt

import pytest
import torch

from tests import oracle
from tests.layouts import GPT2, LLAMA, Layout, sp
from tests.tiny import SINGLE, build

TIED = "embedding.word_embeddings.weight"


def fill(tiny, value: float) -> None:
    """This gradient for every entry of every parameter; none for vocabulary padding, which never
    gets any."""
    for parameter in tiny.components.optimizer.parameters.values():
        parameter.spec.real(parameter.main_grad).fill_(value)


def test_every_gradient_is_a_view_of_one_buffer():
    tiny = build()
    gradients = tiny.components.optimizer.gradients
    gradients.flat.copy_(torch.arange(gradients.flat.numel()))
    seen = torch.cat([parameter.main_grad.flatten() for parameter in gradients.parameters.values()])
    assert torch.equal(seen.sort().values, gradients.flat)
    gradients.zero()
    assert not any(parameter.main_grad.any() for parameter in gradients.parameters.values())


def test_autograds_gradients_are_moved_into_the_buffer():
    """Those of norms, biases and embeddings; layers add the others themselves. None is left in
    `grad`."""
    tiny = build()
    for _ in range(2):
        tiny.components.engine.train_step(*tiny.data.at(0))
    twice = tiny.components.optimizer.gradients.flat.clone()
    tiny.gradient()
    torch.testing.assert_close(
        twice, 2 * tiny.components.optimizer.gradients.flat, rtol=1e-10, atol=1e-14
    )
    assert all(p.grad is None and p.main_grad.any() for p in tiny.components.model.parameters())


def test_half_precision_is_accumulated_in_fp32():
    assert build(precision="bf16").components.optimizer.gradients.flat.dtype == torch.float32
    assert build(precision="fp64").components.optimizer.gradients.flat.dtype == torch.float64


def norm_of_ones(launch, layout: Layout) -> float:
    tiny = build(layout, launch)
    fill(tiny, 1.0)
    return tiny.components.optimizer.gradients.norm()


@pytest.mark.parametrize(
    "layout",
    [
        SINGLE,
        Layout("tp2 x pp2", tp=2, pp=2),
        Layout("tp4+sp, padding only", tp=4, flags=sp(make_vocab_size_divisible_by=128)),
        Layout("dp2 x pp2", dp=2, pp=2),
        Layout("llama tp2 x pp2 +sp", tp=2, pp=2, shape=LLAMA, flags=sp()),
    ],
    ids=lambda layout: layout.name,
)
def test_the_norm_counts_each_parameter_once(pool, layout):
    """Not the tied copy, not what tensor-parallel ranks all hold, not the replicas: a gradient of
    ones has the norm sqrt(number of parameters)."""
    parameters = sum(
        torch.Size(shape).numel() for shape in oracle.parameter_shapes(layout.shape).values()
    )
    assert pool.run(norm_of_ones, layout.world_size, layout) == [
        pytest.approx(sqrt(parameters), rel=1e-14)
    ] * (layout.world_size)


def reduced(launch, layout: Layout) -> dict[str, set[float]]:
    """The entries of each gradient after the reduction, when rank r's are all 10^r."""
    tiny = build(layout, launch)
    fill(tiny, 10.0**launch.rank)
    tiny.components.optimizer.gradients.reduce()
    return {
        name: set(parameter.spec.real(parameter.main_grad).flatten().tolist())
        for name, parameter in tiny.components.optimizer.parameters.items()
    }


def test_sums_over_data_ranks(pool):
    for gradients in pool.run(reduced, 2, Layout("dp2", dp=2)):
        assert set(gradients) == set(oracle.parameter_shapes(GPT2))
        assert all(values == {11.0} for values in gradients.values())


def test_sums_the_tied_embedding_over_first_and_last_stage(pool):
    for stage, gradients in enumerate(pool.run(reduced, 3, Layout("pp3", pp=3))):
        own = {10.0**stage}
        assert gradients.pop(TIED, {101.0}) == {101.0}
        assert all(values == own for values in gradients.values())


def test_an_untied_embedding_is_left_alone(pool):
    first, last = pool.run(reduced, 2, Layout("pp2", pp=2, shape=LLAMA))
    assert first[TIED] == {1.0} and last["output.weight"] == {10.0}


def test_sums_over_tensor_ranks_what_each_computed_from_its_part_of_the_sequence(pool):
    partial = (
        "norm.weight",
        "norm.bias",
        "attention.output.bias",
        "mlp.down.bias",
        "position_embeddings.weight",
    )
    for rank, gradients in enumerate(pool.run(reduced, 2, Layout("tp2+sp", tp=2, flags=sp()))):
        for name, values in gradients.items():
            assert values == ({11.0} if name.endswith(partial) else {10.0**rank}), name
    for rank, gradients in enumerate(pool.run(reduced, 2, Layout("tp2", tp=2))):
        assert all(values == {10.0**rank} for values in gradients.values())


@pytest.mark.parametrize(
    ("norm", "max_norm", "scale"), [(4.0, 1.0, 0.25), (4.0, 8.0, 1.0), (4.0, 0.0, 1.0)]
)
def test_clipping(norm, max_norm, scale):
    gradients = build().components.optimizer.gradients
    gradients.flat.fill_(2.0)
    gradients.clip(norm, max_norm)
    torch.testing.assert_close(
        gradients.flat, torch.full_like(gradients.flat, 2 * scale), rtol=1e-6, atol=0
    )
    if scale == 1.0:
        assert gradients.flat.eq(2.0).all()
