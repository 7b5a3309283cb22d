"""Activations of an MLP in one pass: GELU (the tanh form) with the bias before it, and SwiGLU.

The sources of the formulas are those of csrc/activation.h. Nothing is kept for the backward but the
inputs.
"""

import torch
from torch import Tensor

from megalite.kernels import native

GELU = "tanh"


def _gelu_output(x: Tensor, bias: Tensor | None) -> Tensor:
    """The empty output of bias_gelu. Raises TypeError or ValueError for what it cannot take."""
    native.check_floating("bias_gelu", x, "[..., columns]")
    native.check_operand("the bias", bias, x.shape[-1:], x)
    return native.empty_like(x)


@native.operator("bias_gelu", _gelu_output)
def bias_gelu(x: Tensor, bias: Tensor | None) -> Tensor:
    """gelu(x + bias) for x [..., columns] and bias [columns] or None."""
    y = _gelu_output(x, bias)
    if not native.takes(x) or x.numel() == 0:
        y = x if bias is None else x + bias
        return torch.nn.functional.gelu(y, approximate=GELU).contiguous()
    bias = native.contiguous(bias)
    torch.ops.megalite._bias_gelu(native.as_rows(x), bias, None, out=native.as_rows(y))
    return y


@native.operator("bias_gelu_backward")
def bias_gelu_backward(grad: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """The gradient of x + bias, from the gradient of the output."""
    if not native.takes(x) or x.numel() == 0:
        y = x if bias is None else x + bias
        return torch.ops.aten.gelu_backward(grad, y, approximate=GELU).contiguous()
    dx = native.empty_like(x)
    rows = native.as_rows
    torch.ops.megalite._bias_gelu(rows(x), native.contiguous(bias), rows(grad), out=rows(dx))
    return dx


def _bias_gelu_backward(ctx, grad):
    x, bias = ctx.saved_tensors
    dx = bias_gelu_backward(grad, x, bias)
    return dx, None if bias is None else torch.atleast_2d(dx).flatten(0, -2).sum(dim=0)


def _save_inputs(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


bias_gelu.register_autograd(_bias_gelu_backward, setup_context=_save_inputs)


def _swiglu_output(x: Tensor) -> Tensor:
    """The empty output of swiglu. Raises TypeError or ValueError for what it cannot take."""
    native.check_floating("swiglu", x, "[..., 2 f]")
    if x.shape[-1] % 2:
        raise ValueError(f"swiglu takes gate and up in one tensor [..., 2 f], not {tuple(x.shape)}")
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


@native.operator("swiglu", _swiglu_output)
def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020) for x [..., 2 f], the gate in its first half: [..., f]."""
    y = _swiglu_output(x)
    if not native.takes(x) or y.numel() == 0:
        gate, up = x.chunk(2, dim=-1)
        return (torch.nn.functional.silu(gate) * up).contiguous()
    torch.ops.megalite._swiglu(native.as_rows(x), None, native.as_rows(y))
    return y


@native.operator("swiglu_backward", lambda grad, x: native.empty_like(x))
def swiglu_backward(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of x, from the gradient of the output."""
    if not native.takes(x) or x.numel() == 0:
        gate, up = x.chunk(2, dim=-1)
        d_gate = torch.ops.aten.silu_backward(grad * up, gate)
        return torch.cat([d_gate, grad * torch.nn.functional.silu(gate)], dim=-1).contiguous()
    dx = native.empty_like(x)
    torch.ops.megalite._swiglu(native.as_rows(x), native.as_rows(grad), native.as_rows(dx))
    return dx


swiglu.register_autograd(
    lambda ctx, grad: swiglu_backward(grad, *ctx.saved_tensors), setup_context=_save_inputs
)
