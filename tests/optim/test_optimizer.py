"""The optimizer step against torch's optimizers run by hand, and what it keeps to go on to the
bit."""

import re

import pytest
import torch

from megalite.optim.optimizer import StepResult
from tests.layouts import Layout
from tests.tiny import Tiny, build

FP32 = {"precision": "fp32", "train_iters": 6}


def by_hand(tiny: Tiny, steps: int) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The same steps with torch's plain optimizer on copies of the weights; `tiny` supplies
    gradients at its own, which are set to the copies before each step. Returns weights and gradient
    norms."""
    options = tiny.config.optimizer
    model = tiny.components.model.parameters_by_name
    copies = {
        name: parameter.detach().clone().requires_grad_() for name, parameter in model.items()
    }
    decays = {name: not name.endswith((".bias", "norm.weight")) for name in copies}
    groups = [
        {
            "params": [p for name, p in copies.items() if decays[name] is wanted],
            "weight_decay": decay,
        }
        for wanted, decay in ((True, options.weight_decay), (False, 0.0))
    ]
    if options.optimizer == "adam":
        betas = (options.adam_beta1, options.adam_beta2)
        optimizer = torch.optim.AdamW(groups, betas=betas, eps=options.adam_eps, foreach=False)
    else:
        optimizer = torch.optim.SGD(groups, momentum=options.sgd_momentum, foreach=False)
    norms = []
    for iteration in range(1, steps + 1):
        with torch.no_grad():
            for name, parameter in model.items():
                parameter.copy_(copies[name])
        tiny.gradient((iteration - 1) * tiny.config.data.global_batch_size)
        for name, copy in copies.items():
            copy.grad = model[name].main_grad.clone()
        norms.append(
            torch.nn.utils.clip_grad_norm_(
                copies.values(), options.clip_grad or float("inf")
            ).item()
        )
        for group in optimizer.param_groups:
            group["lr"] = tiny.config.schedule().learning_rate(iteration)
        optimizer.step()
    return {name: copy.detach() for name, copy in copies.items()}, norms


@pytest.mark.parametrize(
    "flags",
    [
        {"lr": 1e-2, "weight_decay": 0.1, "clip_grad": 0.5, "adam_beta2": 0.95},
        {"lr": 1e-2, "clip_grad": 0.0, "adam_eps": 1e-3},
        {"optimizer": "sgd", "lr": 0.1, "weight_decay": 0.1},
        {"optimizer": "sgd", "lr": 0.1, "sgd_momentum": 0.0, "clip_grad": 0.0},
    ],
    ids=["adam", "adam without clipping", "sgd", "sgd without momentum"],
)
def test_steps_equal_torchs_optimizer_by_hand(flags):
    tiny = build(**FP32, **flags)
    norms = [tiny.train(iteration).gradient_norm for iteration in range(1, 5)]
    expected, expected_norms = by_hand(build(**FP32, **flags), 4)
    assert norms == pytest.approx(expected_norms, rel=1e-5)
    for name, parameter in tiny.components.model.parameters_by_name.items():
        # Adam moves an entry whose gradient is all rounding, such as a key's bias, by up to lr
        # either way.
        tolerance = 4 * tiny.config.optimizer.lr if name.endswith("qkv.bias") else 1e-5
        torch.testing.assert_close(
            parameter.detach(), expected[name], rtol=1e-5, atol=tolerance, msg=name
        )


def test_biases_and_norms_do_not_decay():
    """With no gradient at all, a step of AdamW is the decay alone."""
    tiny = build(**FP32, lr=0.5, lr_warmup_iters=0, lr_decay_style="constant", weight_decay=0.1)
    parameters = tiny.components.model.parameters_by_name
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.fill_(2.0)
    assert tiny.components.optimizer.step(1) == StepResult(gradient_norm=0.0, learning_rate=0.5)
    stayed = {name for name, parameter in parameters.items() if parameter.eq(2.0).all()}
    assert stayed == {name for name in parameters if name.endswith((".bias", "norm.weight"))}
    for name in parameters.keys() - stayed:
        torch.testing.assert_close(
            parameters[name].detach(), torch.full_like(parameters[name], 2 * (1 - 0.5 * 0.1))
        )


def test_bf16_weights_are_rounded_from_fp32_masters():
    tiny = build(
        precision="bf16", lr=1e-5, lr_warmup_iters=0, lr_decay_style="constant", weight_decay=0.0
    )
    optimizer, parameters = tiny.components.optimizer, tiny.components.model.parameters_by_name
    start = {name: master.clone() for name, master in optimizer.master.items()}
    for name, master in start.items():
        assert master.dtype == torch.float32 and torch.equal(master, parameters[name].float())
    for iteration in range(1, 4):
        tiny.train(iteration)
    for name, parameter in parameters.items():
        assert parameter.dtype == torch.bfloat16 and torch.equal(
            parameter, optimizer.master[name].bfloat16()
        )
    # Steps of 1e-5 are lost in a bf16 weight of 1, and are not in its master.
    norm = "final_norm.weight"
    assert parameters[norm].eq(1).all() and not optimizer.master[norm].eq(1).any()


def test_full_precision_needs_no_masters():
    tiny = build(**FP32)
    for name, parameter in tiny.components.model.parameters_by_name.items():
        assert tiny.components.optimizer.master[name].data_ptr() == parameter.data_ptr()
    assert {kind for kind, _, _ in tiny.components.optimizer.state()} == {"exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_a_gradient_that_is_not_finite_leaves_the_weights_alone(value):
    """Nor one whose square is not: its norm cannot be told from inf."""
    tiny = build(**FP32)
    tiny.train(1)
    before = {
        name: parameter.detach().clone()
        for name, parameter in tiny.components.model.parameters_by_name.items()
    }
    tiny.gradient()
    tiny.components.optimizer.parameters["final_norm.bias"].main_grad[3] = value
    result = tiny.components.optimizer.step(2)
    assert result.skipped and re.fullmatch("the gradient norm is (nan|inf)", result.bad)
    for name, parameter in tiny.components.model.parameters_by_name.items():
        assert torch.equal(parameter, before[name])
    assert tiny.components.optimizer.steps == 1


def nan_on_rank_1(launch) -> str:
    tiny = build(Layout("dp2", dp=2), launch)
    tiny.gradient()
    if launch.rank == 1:
        tiny.components.optimizer.parameters["final_norm.bias"].main_grad[3] = float("nan")
    return tiny.components.optimizer.step(1).bad


def test_every_rank_hears_of_a_gradient_that_is_not_finite(pool):
    messages = pool.run(nan_on_rank_1, 2)
    assert messages == ["the gradient norm is nan"] * 2


RESUMED = {
    "adam": FP32,
    "bf16": {"precision": "bf16", "train_iters": 6},
    "sgd": {**FP32, "optimizer": "sgd"},
    "lion": {**FP32, "optimizer": "lion", "lr": 1e-3},
    "muon": {"precision": "bf16", "train_iters": 6, "optimizer": "muon"},
    "sgd without momentum": {**FP32, "optimizer": "sgd", "sgd_momentum": 0.0},
}


@pytest.mark.parametrize("flags", RESUMED.values(), ids=RESUMED.keys())
@pytest.mark.parametrize("done", [0, 2])
def test_a_restored_optimizer_goes_on_to_the_bit(flags, done):
    first = build(**flags)
    for iteration in range(1, done + 1):
        first.train(iteration)
    stored = {
        (kind, name): tensor.clone() for kind, name, tensor in first.components.optimizer.state()
    }
    weights = {
        name: p.detach().clone() for name, p in first.components.model.parameters_by_name.items()
    }
    steps = first.components.optimizer.steps
    assert steps == done

    second = build(**flags, seed=99)
    with torch.no_grad():
        for name, parameter in second.components.model.parameters_by_name.items():
            assert (
                name.endswith(".bias")
                or "norm" in name
                or not torch.equal(parameter, weights[name])
            )
            parameter.copy_(weights[name])
        restored = list(second.components.optimizer.state())
        assert {(kind, name) for kind, name, _ in restored} == stored.keys()
        for kind, name, tensor in restored:
            tensor.copy_(stored[kind, name])
    second.components.optimizer.set_steps(steps)

    for iteration in range(done + 1, done + 3):
        assert first.train(iteration) == second.train(iteration)
    for name, parameter in first.components.model.parameters_by_name.items():
        assert torch.equal(parameter, second.components.model.parameters_by_name[name])
    for (kind, name, a), (_, _, b) in zip(
        first.components.optimizer.state(), second.components.optimizer.state()
    ):
        assert torch.equal(a, b), (kind, name)
    assert first.components.optimizer.steps == second.components.optimizer.steps
