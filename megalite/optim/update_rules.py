"""The update rules: how weights are changed, given their gradients."""

from collections.abc import Callable

import torch

from megalite.optim.apex_adam import adam_backend, apex_adam
from megalite.optim.config import OptimizerConfig
from megalite.optim.gradients import GradientBuffer
from megalite.optim.lion import Lion
from megalite.optim.muon import SCALES, Muon, WholeMatrices

Rule = Callable[[list[dict], OptimizerConfig, GradientBuffer], torch.optim.Optimizer]
"""Makes one of torch's optimizers from parameter groups. Beside torch's keys, a group has `names`,
the global names of its parameters, and their `treatment`. With a sharded gradient buffer the
parameters are flat ranges; `all_names` also has the names of which this rank updates nothing, and a
group may be empty. The optimizer keeps the tensors that
`OptimizerConfig.moments` names in its `state`, each of the shape of its parameter."""


def _adam(groups: list[dict], config: OptimizerConfig, gradients: GradientBuffer):
    backend, _ = adam_backend(config, gradients.context.device)
    if backend == "apex" and any(group["params"] for group in groups):
        return apex_adam(groups, config)
    return torch_adam(groups, config)


def torch_adam(groups: list[dict], config: OptimizerConfig) -> torch.optim.Optimizer:
    """torch's AdamW, in one fused pass over the weights: 3 to 4 times faster than its other
    implementations, also on the CPU."""
    betas = (config.adam_beta1, config.adam_beta2)
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.adam_eps, fused=True)


def _sgd(groups: list[dict], config: OptimizerConfig, gradients: GradientBuffer):
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.sgd_momentum, fused=True)


def _lion(groups: list[dict], config: OptimizerConfig, gradients: GradientBuffer):
    return Lion(groups, lr=config.lr, betas=(config.lion_beta1, config.lion_beta2))


def _muon(groups: list[dict], config: OptimizerConfig, gradients: GradientBuffer):
    names = [name for group in groups for name in group["all_names"]]
    factor = config.muon_extra_scale_factor
    scale = SCALES[config.muon_scale_mode]
    return Muon(
        groups,
        WholeMatrices(gradients, names),
        lr=config.lr,
        momentum=config.muon_momentum,
        nesterov=config.muon_nesterov,
        coefficients=config.muon_coefficient_type,
        steps=config.muon_num_ns_steps,
        scale=lambda m, n: factor * scale(m, n),
    )


UPDATE_RULES: dict[str, Rule] = {"adam": _adam, "sgd": _sgd, "lion": _lion, "muon": _muon}


def weights_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """What an optimizer updates."""
    return [weight for group in optimizer.param_groups for weight in group["params"]]


def allocate_moments(
    optimizer: torch.optim.Optimizer, weights: list[torch.Tensor], moments: tuple[str, ...]
) -> None:
    """Allocate what an optimizer keeps for each of its weights, zero, unless it is there.

    Zero is also what torch's first step starts SGD's momentum from, since dampening is 0: it sets
    the buffer to the gradient, which is momentum * 0 + gradient.
    """
    for weight in weights:
        state = optimizer.state[weight]
        for kind in moments:
            if state.get(kind) is None:
                state[kind] = torch.zeros_like(weight)


def set_step_count(
    optimizer: torch.optim.Optimizer, weights: list[torch.Tensor], steps: int
) -> None:
    """Tell an optimizer that counts its steps, as Adam does for its bias correction, how many it
    has taken with its weights."""
    if isinstance(optimizer, torch.optim.AdamW):
        for weight in weights:
            # As torch's fused implementation keeps it.
            count = torch.tensor(steps, dtype=torch.float32, device=weight.device)
            optimizer.state[weight]["step"] = count
        return
    for group in optimizer.param_groups:
        if "step" in group:  # as apex keeps it
            group["step"] = steps
