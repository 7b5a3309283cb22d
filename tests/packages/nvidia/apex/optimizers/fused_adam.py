import amp_C  # noqa: F401
import torch


class FusedAdam(torch.optim.Optimizer):
    def __init__(
        self,
        params,
        lr=1e-3,
        bias_correction=True,
        betas=(0.9, 0.999),
        eps=1e-8,
        adam_w_mode=True,
        weight_decay=0.0,
        amsgrad=False,
        set_grad_none=True,
        capturable=False,
        master_weights=False,
    ):
        assert adam_w_mode and bias_correction and set_grad_none
        assert not (amsgrad or capturable or master_weights)
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(
        self,
        closure=None,
        grads=None,
        output_params=None,
        scale=None,
        grad_norms=None,
        grad_scaler=None,
    ):
        given = (closure, grads, output_params, scale, grad_norms, grad_scaler)
        assert all(argument is None for argument in given)
        for group in self.param_groups:
            group["params"][0].device  # noqa: B018 - apex's fails for a group without parameters
            group["step"] = group.get("step", 0) + 1
            for weight in group["params"]:
                assert weight.dtype in (torch.float32, torch.float16, torch.bfloat16)
                state = self.state[weight]
                if len(state) == 0:
                    state["exp_avg"] = torch.zeros_like(weight)
                    state["exp_avg_sq"] = torch.zeros_like(weight)
                self._update(weight, state, group)

    def _update(self, weight, state, group):
        beta1, beta2 = group["betas"]
        mean = state["exp_avg"].mul_(beta1).add_(weight.grad, alpha=1 - beta1)
        square = state["exp_avg_sq"].mul_(beta2).add_(weight.grad**2, alpha=1 - beta2)
        mean = mean / (1 - beta1 ** group["step"])
        square = square / (1 - beta2 ** group["step"])
        update = mean / (square.sqrt() + group["eps"]) + group["weight_decay"] * weight
        weight.sub_(group["lr"] * update)
