"""Rotary position embedding (Su et al. 2021) in one pass over queries or keys."""

import torch

from megalite.kernels import native


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the two halves (a, b) of each head of x [s, b, n, d]: (a cos - b sin, b cos + a sin).

    cos and sin [..., d] broadcast to x; both halves of a row are equal, and only the first is read.
    x may have any strides; the result is contiguous. cos and sin have no gradient.
    """
    return turn(x, cos, sin, inverse=False)


@native.operator("rotary")
def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, inverse: bool) -> torch.Tensor:
    """`rotary`, or with `inverse` the rotation by the opposite angles, which is its gradient."""
    _check(x, cos, sin)
    if not native.takes(x) or x.numel() == 0:
        first, second = x.chunk(2, dim=-1)
        if inverse:
            sin = -sin
        return (x * cos + torch.cat([-second, first], dim=-1) * sin).contiguous()
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    torch.ops.megalite._rotary(
        _with_contiguous_rows(x),
        _with_contiguous_rows(cos).expand(x.shape),
        _with_contiguous_rows(sin).expand(x.shape),
        inverse=inverse,
        out=y,
    )
    return y


def _with_contiguous_rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _check(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    if x.dim() != 4 or not x.is_floating_point() or x.shape[-1] % 2:
        raise ValueError(
            "rotary takes floating-point heads [s, b, n, d], d even, "
            f"not {x.dtype} {tuple(x.shape)}"
        )
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dtype != x.dtype or table.device != x.device:
            raise TypeError(
                f"{name} is {table.dtype} on {table.device}, x is {x.dtype} on {x.device}"
            )
        fits = zip(table.shape, x.shape)
        if (
            table.dim() != 4
            or table.shape[-1] != x.shape[-1]
            or any(t not in (1, size) for t, size in fits)
        ):
            raise ValueError(f"{name} {tuple(table.shape)} does not broadcast to {tuple(x.shape)}")


@turn.register_fake
def _(x, cos, sin, inverse):
    _check(x, cos, sin)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output):
    if any(ctx.needs_input_grad[1:3]):
        raise ValueError("rotary has no gradient for cos and sin, but one of them requires it")
    _, cos, sin, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx, grad):
    return turn(grad, *ctx.saved_tensors, inverse=not ctx.inverse), None, None, None


turn.register_autograd(_backward, setup_context=_save)
