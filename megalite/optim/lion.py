"""Lion (Chen et al. 2023, Symbolic discovery of optimization algorithms, algorithm 2)."""

import torch


class Lion(torch.optim.Optimizer):
    """Moves every weight by the learning rate, in the direction of a sign.

    With gradient g and running mean m: u = sign(beta1 m + (1 - beta1) g); w = (1 - lr wd) w - lr u;
    m = beta2 m + (1 - beta2) g. The mean is kept as `exp_avg`.

    Args:
        groups: weights, or torch's parameter groups.
        lr: learning rate, of groups that have none of their own; likewise the others.
        betas: beta1 and beta2.
        weight_decay: decoupled weight decay, wd.
    """

    def __init__(
        self,
        groups,
        lr: float,
        betas: tuple[float, float] = (0.95, 0.98),
        weight_decay: float = 0.0,
    ):
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Update the weights that have a gradient. A closure is not called."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if "exp_avg" not in state:
                    state["exp_avg"] = torch.zeros_like(weight)
                mean = state["exp_avg"]
                direction = torch.lerp(weight.grad, mean, beta1).sign_()
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(direction, alpha=-group["lr"])
                mean.lerp_(weight.grad, 1 - beta2)
