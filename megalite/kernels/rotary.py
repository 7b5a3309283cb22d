"""Rotary position embedding (Su et al. 2021) in one pass over queries or keys."""

import torch
from torch import Tensor

from megalite.kernels import native


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the two halves (a, b) of each head of x [s, b, n, d]: (a cos - b sin, b cos + a sin).

    cos and sin [..., d] broadcast to x; both halves of a row are equal, and only the first is read.
    x may have any strides; the result is contiguous. cos and sin have no gradient.
    """
    return turn(x, cos, sin, inverse=False)


def _output(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    """The empty output of turn. Raises TypeError or ValueError for what it cannot take."""
    if x.dim() != 4 or not x.is_floating_point() or x.shape[-1] % 2:
        raise ValueError(
            "rotary takes floating-point heads [s, b, n, d], d even, "
            f"not {x.dtype} {tuple(x.shape)}"
        )
    for name, table in (("cos", cos), ("sin", sin)):
        native.check_alike(name, table, x)
        whole = table.dim() == 4 and table.shape[-1] == x.shape[-1]
        if not whole or not native.broadcasts(table.shape, x.shape):
            raise ValueError(f"{name} {tuple(table.shape)} does not broadcast to {tuple(x.shape)}")
    return native.empty_like(x)


@native.operator("rotary", _output)
def turn(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    """`rotary`, or with `inverse` the rotation by the opposite angles, which is its gradient."""
    y = _output(x, cos, sin, inverse)
    if not native.takes(x) or x.numel() == 0:
        first, second = x.chunk(2, dim=-1)
        if inverse:
            sin = -sin
        y = torch.cat([-second, first], dim=-1)
        return (x * cos + y * sin).contiguous()
    cos = _with_contiguous_rows(cos).expand(x.shape)
    sin = _with_contiguous_rows(sin).expand(x.shape)
    torch.ops.megalite._rotary(_with_contiguous_rows(x), cos, sin, inverse=inverse, out=y)
    return y


def _with_contiguous_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _save(ctx, inputs, output):
    if any(ctx.needs_input_grad[1:3]):
        raise ValueError("rotary has no gradient for cos and sin, but one of them requires it")
    _, cos, sin, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx, grad):
    return turn(grad, *ctx.saved_tensors, inverse=not ctx.inverse), None, None, None


turn.register_autograd(_backward, setup_context=_save)
