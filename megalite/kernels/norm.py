"""RMSNorm (Zhang and Sennrich 2019) of a sum: s = x + residual, y = weight * s / sqrt(mean(s^2) +
epsilon).

Everything is computed in fp32 (fp64 for fp64), the gradient of the weight too. For LayerNorm
torch's own operator is as fast (docs/kernels.md).
"""

import torch
from torch import Tensor

from megalite.kernels import native

GROUPS = {"cpu": 64, "cuda": 1024}
"""Groups that the backward divides the rows into, at most; each has a partial sum of the weight's
gradient."""


def rms_norm(
    x: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(y, s) for x and residual [..., h] and weight [h]; without a residual s is x."""
    y, s, _ = rms_norm_forward(x, weight, epsilon, residual)
    return y, x if residual is None else s


def _outputs(
    x: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The empty outputs of rms_norm_forward. Raises TypeError or ValueError for what it cannot
    take."""
    native.check_floating("rms_norm", x, "[..., rows, h]", dims=2)
    native.check_operand("the weight", weight, x.shape[-1:], x)
    native.check_operand("the residual", residual, x.shape, x)
    y = native.empty_like(x)
    s = x.new_empty(0) if residual is None else torch.empty_like(y)
    return y, s, x.new_empty(x.shape[:-1], dtype=native.sums_dtype(x))


@native.operator("rms_norm", _outputs)
def rms_norm_forward(
    x: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, s or without a residual an empty tensor, 1 / sqrt(mean(s^2) + epsilon) of each row
    [...]).

    The third has no gradient.
    """
    y, s, scale = _outputs(x, weight, epsilon, residual)
    if x.numel() == 0:
        return y, s, scale
    if not native.takes(x):
        if residual is not None:
            x = s = (x + residual).contiguous()
        wide = x.to(scale.dtype)
        scale = torch.rsqrt(wide.square().mean(dim=-1) + epsilon)
        y = (wide * scale.unsqueeze(-1) * weight).to(x.dtype)
        return y.contiguous(), s, scale
    outputs = dict(out=y, sum=None if residual is None else s, scale=scale)
    residual = native.as_rows(residual)
    torch.ops.megalite._rms_norm_forward(
        native.as_rows(x), residual, weight.contiguous(), epsilon=epsilon, **outputs
    )
    return y, s, scale


def _gradients(grad, grad_sum, s, weight, scale) -> tuple[Tensor, Tensor]:
    return native.empty_like(s), torch.empty_like(weight)


@native.operator("rms_norm_backward", _gradients)
def rms_norm_backward(
    grad: Tensor, grad_sum: Tensor | None, s: Tensor, weight: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of s and of the weight; grad_sum is the gradient of s from its other uses, or
    None."""
    if s.numel() == 0:
        return native.empty_like(s), torch.zeros_like(weight)
    if not native.takes(s):
        normal = s.to(scale.dtype) * scale.unsqueeze(-1)
        d = grad.to(scale.dtype)
        grad_weight = (d * normal).flatten(0, -2).sum(dim=0)
        d = d * weight
        ds = scale.unsqueeze(-1) * (d - normal * (d * normal).mean(dim=-1, keepdim=True))
        if grad_sum is not None:
            ds = ds + grad_sum
        return ds.to(s.dtype).contiguous(), grad_weight.to(weight.dtype)
    rows = s.numel() // s.shape[-1]
    group = -(-rows // GROUPS[s.device.type])
    # Each group of rows has a partial sum of the weight's gradient.
    sums = torch.empty((-(-rows // group), s.shape[-1]), dtype=torch.float32, device=s.device)
    ds = native.empty_like(s)
    grad = native.as_rows(grad)
    options = dict(grad_sum=native.as_rows(grad_sum), scale=scale.contiguous(), group=group)
    torch.ops.megalite._rms_norm_backward(
        native.as_rows(s), weight.contiguous(), grad, **options, out=ds, grad_weight=sums
    )
    return ds, sums.sum(dim=0).to(weight.dtype)


def _save(ctx, inputs, output):
    x, weight, _, residual = inputs
    _, s, scale = output
    ctx.has_residual = residual is not None
    ctx.save_for_backward(s if ctx.has_residual else x, weight, scale)
    ctx.mark_non_differentiable(scale)


def _backward(ctx, grad, grad_sum, _):
    grad_sum = grad_sum if ctx.has_residual else None
    ds, grad_weight = rms_norm_backward(grad, grad_sum, *ctx.saved_tensors)
    return ds, grad_weight, None, ds if ctx.has_residual else None


rms_norm_forward.register_autograd(_backward, setup_context=_save)
