"""Lion and Muon: their formulas, and the same weights in every layout."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from megalite.nn.parameter import held_boxes
from megalite.optim.muon import COEFFICIENTS, orthogonalize
from megalite.training.replicas import check_replicas
from tests.layouts import GPT2, LLAMA, OVERLAP, QWEN3, ZERO, Layout, as_bert, sp
from tests.test_layouts import boxes, largest_difference
from tests.tiny import build

STEPS = 4
RULES = {
    "lion": {"optimizer": "lion", "lr": 1e-3},
    # A key's bias has no gradient but rounding, which AdamW divides by epsilon.
    "muon": {"optimizer": "muon", "muon_extra_scale_factor": 0.2, "adam_eps": 1e-4},
}
ALL = ZERO | OVERLAP | {"overlap_param_gather": True}
LAYOUTS = [
    Layout("dp2", dp=2),
    Layout("tp4 + sp", tp=4, flags=sp()),
    Layout("pp2", pp=2),
    Layout("dp4, zero", dp=4, flags=ZERO),
    Layout("2x2x2 + sp, zero, overlapped", 2, 2, 2, flags=sp(**ALL)),
    Layout("llama 2x2x2 + sp, zero, overlapped", 2, 2, 2, shape=LLAMA, flags=sp(**ALL)),
    Layout("qwen3 tied tp2 x dp3, zero", tp=2, dp=3, shape=replace(QWEN3, tied=True), flags=ZERO),
    Layout("bert tp2 x dp2, zero", tp=2, dp=2, shape=as_bert(GPT2), flags=ZERO),
]


def real_gradients(name: str, values: torch.Tensor) -> torch.Tensor:
    """Without the biases of keys, which no loss depends on: a sign of their rounding is noise."""
    if name.endswith("qkv.bias"):
        values = values.clone()
        values[:, -2] = 0
    return values


def training_on_rank(launch, layout: Layout, flags: dict) -> tuple[list, list]:
    """(name, box, values) of this rank's weights after some steps, and of what its optimizer
    keeps."""
    tiny = build(layout, launch, **flags)
    for iteration in range(1, STEPS + 1):
        tiny.train(iteration)
    if layout.world_size > 1:
        check_replicas(tiny.components, STEPS)
    weights = boxes(tiny.components, lambda parameter: parameter)
    optimizer = tiny.components.optimizer
    kept = []
    for kind, name, tensor in optimizer.state():
        held = held_boxes(optimizer.parameters[name], tensor, optimizer.ranges[name])
        kept += [(f"{kind} of {name}", box, values.clone()) for box, values in held]
    return [(name, box, real_gradients(name, values)) for name, box, values in weights], kept


@cache
def one_rank(pool, shape, rule: str, batch: int) -> list[dict[str, torch.Tensor]]:
    """By name: the weights, and what the optimizer keeps."""
    flags = RULES[rule] | {"global_batch_size": batch}
    (found,) = pool.run(training_on_rank, 1, Layout("single", shape=shape), flags)
    return [{name: values for name, _, values in part} for part in found]


@pytest.mark.parametrize(
    ("layout", "rule"),
    [(layout, "muon") for layout in LAYOUTS] + [(layout, "lion") for layout in LAYOUTS[-4:]],
    ids=lambda value: getattr(value, "name", value),
)
def test_weights_are_the_same_in_every_layout(pool, layout, rule):
    batch = 6 if layout.dp == 3 else 8
    flags = RULES[rule] | {"global_batch_size": batch}
    expected = one_rank(pool, layout.shape, rule, batch)
    results = pool.run(training_on_rank, layout.world_size, layout, flags)
    for i, wanted in enumerate(expected):
        shapes = {name: values.shape for name, values in wanted.items()}
        found = [box for result in results for box in result[i]]
        assert largest_difference(found, wanted, shapes) < 1e-9


def polynomial(kind: str, steps: int, values: torch.Tensor) -> torch.Tensor:
    """What Newton-Schulz makes of singular values."""
    for i in range(steps):
        a, b, c = COEFFICIENTS[kind][min(i, len(COEFFICIENTS[kind]) - 1)]
        values = a * values + b * values**3 + c * values**5
    return values


@pytest.mark.parametrize(("kind", "steps"), [("quintic", 5), ("simple", 5), ("quintic", 7)])
@pytest.mark.parametrize("shape", [(6, 10), (10, 6)])
def test_orthogonalize_changes_the_singular_values_alone(kind, steps, shape):
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(shape, generator=generator, dtype=torch.float64)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    wanted = polynomial(kind, steps, s / (s.norm() + 1e-7))
    expected = u @ torch.diag(wanted) @ v
    torch.testing.assert_close(orthogonalize(matrix, kind, steps), expected, rtol=0, atol=1e-12)
    assert (wanted - 1).abs().max() < 0.4
    assert orthogonalize(torch.zeros(shape)).eq(0).all()


SCALES = {
    "spectral": lambda m, n: max(m, n) ** 0.5,
    "unit_rms_norm": lambda m, n: (m / n) ** 0.5,
    "shape_scaling": lambda m, n: max(1, m / n) ** 0.5,
}


def is_matrix(name: str) -> bool:
    return name.startswith("layers.") and not name.endswith((".bias", "norm.weight"))


def muon_update(name: str, direction: torch.Tensor, scale) -> torch.Tensor:
    """Of one weight, matrix by matrix: of qkv the rows of all queries, of all keys, of all
    values."""
    update = torch.empty_like(direction)
    parts = [slice(None)]
    if name.endswith("qkv.weight"):
        queries = direction.shape[1] - 2
        parts = [(slice(None), slice(0, queries)), (slice(None), queries), (slice(None), -1)]
    elif direction.dim() == 3:
        parts = [0, 1]
    for part in parts:
        matrix = direction[part].reshape(-1, direction.shape[-1])
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        ortho = u @ torch.diag(polynomial("quintic", 5, s / (s.norm() + 1e-7))) @ v
        update[part] = (scale(*matrix.shape) * ortho).view(direction[part].shape)
    return update


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("scale", SCALES)
def test_muon_by_hand(nesterov, scale):
    flags = RULES["muon"] | {"muon_nesterov": nesterov, "muon_scale_mode": scale, "clip_grad": 0.0}
    shape = replace(LLAMA, groups=2, bias=True)
    tiny = build(Layout("llama", shape=shape), **flags, weight_decay=0.3)
    parameters = tiny.components.model.parameters_by_name
    momentum = dict.fromkeys(parameters, 0.0)
    for iteration in range(1, 4):
        tiny.gradient(8 * (iteration - 1))
        before = {name: p.detach().clone() for name, p in parameters.items()}
        gradients = {name: p.main_grad.clone() for name, p in parameters.items()}
        tiny.components.optimizer.step(iteration)
        rate = tiny.config.schedule().learning_rate(iteration)
        for name, g in gradients.items():
            momentum[name] = 0.95 * momentum[name] + g
            if not is_matrix(name):
                continue
            direction = g + 0.95 * momentum[name] if nesterov else momentum[name]
            update = 0.2 * muon_update(name, direction, SCALES[scale])
            expected = before[name] * (1 - rate * 0.3) - rate * update
            torch.testing.assert_close(parameters[name].detach(), expected, rtol=0, atol=1e-12)
    kinds = {name: set() for name in parameters}
    for kind, name, _ in tiny.components.optimizer.state():
        kinds[name].add(kind)
    for name, found in kinds.items():
        wanted = {"momentum_buffer"} if is_matrix(name) else {"exp_avg", "exp_avg_sq"}
        assert found == wanted, name


def test_lion_by_hand():
    flags = RULES["lion"] | {"lion_beta1": 0.8, "lion_beta2": 0.9, "clip_grad": 0.0}
    tiny = build(**flags, weight_decay=0.3)
    parameters = tiny.components.model.parameters_by_name
    mean = dict.fromkeys(parameters, 0.0)
    for iteration in range(1, 4):
        tiny.gradient(8 * (iteration - 1))
        before = {name: p.detach().clone() for name, p in parameters.items()}
        gradients = {name: p.main_grad.clone() for name, p in parameters.items()}
        tiny.components.optimizer.step(iteration)
        rate = tiny.config.schedule().learning_rate(iteration)
        for name, g in gradients.items():
            update = (0.8 * mean[name] + 0.2 * g).sign()
            decay = 0.0 if name.endswith((".bias", "norm.weight")) else 0.3
            expected = before[name] * (1 - rate * decay) - rate * update
            torch.testing.assert_close(
                real_gradients(name, parameters[name].detach()),
                real_gradients(name, expected),
                rtol=1e-12,
                atol=1e-14,
            )
            mean[name] = 0.9 * mean[name] + 0.1 * g
    assert {kind for kind, _, _ in tiny.components.optimizer.state()} == {"exp_avg"}
