"""AdamW by NVIDIA apex's FusedAdam: one kernel for many tensors, on GPUs."""

import torch

from megalite.optim.config import OptimizerConfig
from megalite.system.apex import ADAM, why_no_apex


def adam_backend(config: OptimizerConfig, device: torch.device) -> tuple[str, str]:
    """(torch or apex, reason): what updates the weights that AdamW updates."""
    if config.optimizer_backend != "auto":
        return config.optimizer_backend, f"--optimizer-backend {config.optimizer_backend}"
    if device.type != "cuda":
        return "torch", "apex needs a GPU"
    if config.dtype == "float64":
        return "torch", "apex has no fp64"
    problem = why_no_apex(ADAM)
    if problem:
        return "torch", problem
    return "apex", "it is installed"


def apex_adam(groups: list[dict], config: OptimizerConfig) -> torch.optim.Optimizer:
    """FusedAdam of torch's parameter groups. Its count of steps is `step` of each group, its
    moments are in its state, as torch's.

    Groups without parameters, which it cannot take, are left out. Imports apex.
    """
    from apex.optimizers import FusedAdam

    return FusedAdam(
        [group | {"step": 0} for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_eps,
        adam_w_mode=True,
    )
