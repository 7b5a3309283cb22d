"""RMSNorm (Zhang and Sennrich 2019) of a sum: s = x + residual, y = weight * s / sqrt(mean(s^2) +
epsilon).

Everything is computed in fp32 (fp64 for fp64), the gradient of the weight too. For LayerNorm
torch's own operator is as fast (docs/kernels.md).
"""

import torch

from megalite.kernels import native

GROUPS = {"cpu": 64, "cuda": 1024}
"""Groups that the backward divides the rows into, at most; each has a partial sum of the weight's
gradient."""


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, epsilon: float, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, s) for x and residual [..., h] and weight [h]; without a residual s is x."""
    y, s, _ = rms_norm_forward(x, weight, epsilon, residual)
    return y, x if residual is None else s


@native.operator("rms_norm")
def rms_norm_forward(
    x: torch.Tensor, weight: torch.Tensor, epsilon: float, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, s or without a residual an empty tensor, 1 / sqrt(mean(s^2) + epsilon) of each row
    [...]).

    The third has no gradient.
    """
    _check(x, weight, residual)
    y, s, scale = _outputs(x, residual)
    if x.numel() == 0:
        return y, s, scale
    if not native.takes(x):
        if residual is not None:
            x = s = (x + residual).contiguous()
        wide = x.to(scale.dtype)
        scale = torch.rsqrt(wide.square().mean(dim=-1) + epsilon)
        y = (wide * scale.unsqueeze(-1) * weight).to(x.dtype)
        return y.contiguous(), s, scale
    if residual is not None:
        residual = native.as_rows(residual)
    torch.ops.megalite._rms_norm_forward(
        native.as_rows(x),
        residual,
        weight.contiguous(),
        epsilon=epsilon,
        out=y,
        sum=None if residual is None else s,
        scale=scale,
    )
    return y, s, scale


@native.operator("rms_norm_backward")
def rms_norm_backward(
    grad: torch.Tensor,
    grad_sum: torch.Tensor | None,
    s: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of s and of the weight; grad_sum is the gradient of s from its other uses, or
    None."""
    if s.numel() == 0:
        return torch.empty_like(s, memory_format=torch.contiguous_format), torch.zeros_like(weight)
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
    ds = torch.empty_like(s, memory_format=torch.contiguous_format)
    if grad_sum is not None:
        grad_sum = native.as_rows(grad_sum)
    torch.ops.megalite._rms_norm_backward(
        native.as_rows(s),
        weight.contiguous(),
        native.as_rows(grad),
        grad_sum=grad_sum,
        scale=scale.contiguous(),
        group=group,
        out=ds,
        grad_weight=sums,
    )
    return ds, sums.sum(dim=0).to(weight.dtype)


def _check(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None) -> None:
    if x.dim() < 2 or not x.is_floating_point():
        raise TypeError(
            f"rms_norm takes floating-point tensors [..., rows, h], not {x.dtype} {tuple(x.shape)}"
        )
    for name, other, shape in (("weight", weight, x.shape[-1:]), ("residual", residual, x.shape)):
        if other is None:
            continue
        if other.shape != shape:
            raise ValueError(f"the {name} is {tuple(other.shape)}, not {tuple(shape)}")
        if other.dtype != x.dtype or other.device != x.device:
            raise TypeError(
                f"the {name} is {other.dtype} on {other.device}, x is {x.dtype} on {x.device}"
            )


def _outputs(
    x: torch.Tensor, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    s = x.new_empty(0) if residual is None else torch.empty_like(y)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return y, s, torch.empty(x.shape[:-1], dtype=wide, device=x.device)


@rms_norm_forward.register_fake
def _(x, weight, epsilon, residual):
    _check(x, weight, residual)
    return _outputs(x, residual)


@rms_norm_backward.register_fake
def _(grad, grad_sum, s, weight, scale):
    return torch.empty_like(s, memory_format=torch.contiguous_format), torch.empty_like(weight)


def _save(ctx, inputs, output):
    x, weight, _, residual = inputs
    _, s, scale = output
    ctx.has_residual = residual is not None
    ctx.save_for_backward(s if ctx.has_residual else x, weight, scale)
    ctx.mark_non_differentiable(scale)


def _backward(ctx, grad, grad_sum, _):
    ds, grad_weight = rms_norm_backward(
        grad, grad_sum if ctx.has_residual else None, *ctx.saved_tensors
    )
    return ds, grad_weight, None, ds if ctx.has_residual else None


rms_norm_forward.register_autograd(_backward, setup_context=_save)
