"""Norms and zeros by layer: those of one rank in every layout."""

import pytest
import torch

from tests.layouts import Layout, sp
from tests.tiny import SINGLE, build

FLAGS = {
    "log_params_norm": True,
    "log_num_zeros_in_grad": True,
    "log_norms_per_layer": True,
    "train_iters": 6,
}
ZERO = {"use_distributed_optimizer": True, "overlap_param_gather": True}


def numbers(launch, layout: Layout, flags: dict) -> list[dict]:
    """What two steps report."""
    tiny = build(layout, launch, **FLAGS, **flags)
    return [tiny.train(iteration).statistics for iteration in (1, 2)]


def test_the_numbers_are_those_of_the_tensors():
    tiny = build(**FLAGS, clip_grad=0.0)
    parameters = tiny.components.model.parameters_by_name
    tiny.gradient()
    parameters["layers.0.mlp.up.bias"].main_grad[:5] = 0
    reported = tiny.components.optimizer.step(1).statistics
    norms = {name: parameter.norm().item() ** 2 for name, parameter in parameters.items()}
    assert reported["params_norm"] == pytest.approx(sum(norms.values()) ** 0.5, rel=1e-12)
    final = parameters["final_norm.weight"].norm() ** 2 + parameters["final_norm.bias"].norm() ** 2
    assert reported["params_norm/final_norm"] == pytest.approx(final.item() ** 0.5, rel=1e-12)
    zeros = sum((p.main_grad == 0).sum().item() for p in parameters.values())
    padding = sum(
        p.main_grad.numel() - p.spec.real(p.main_grad).numel() for p in parameters.values()
    )
    assert reported["zeros_in_grad"] == zeros - padding == 5
    layer = [p.main_grad.flatten() for n, p in parameters.items() if n.startswith("layers.1.")]
    expected = torch.linalg.vector_norm(torch.cat(layer)).item()
    assert reported["grad_norm/layers.1"] == pytest.approx(expected, rel=1e-12)


def test_the_numbers_are_the_same_in_every_layout(pool):
    wanted = pool.run(numbers, 1, SINGLE, {})[0]
    layout = Layout("dp2tp2pp2", dp=2, tp=2, pp=2, flags=sp())
    for flags in ({}, ZERO):
        for found in pool.run(numbers, 8, layout, flags):
            for one, other in zip(found, wanted):
                assert set(one) == set(other)
                for name, value in other.items():
                    # Sums in another order, of values that differ by their own rounding.
                    assert one[name] == pytest.approx(value, rel=1e-9), name
