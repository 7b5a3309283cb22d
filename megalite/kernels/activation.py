"""Activations of an MLP in one pass: GELU (the tanh form) with the bias before it, and SwiGLU.

The sources of the formulas are those of csrc/activation.h. Nothing is kept for the backward but the
inputs.
"""

import torch

from megalite.kernels import native

GELU = "tanh"


@native.operator("bias_gelu")
def bias_gelu(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """gelu(x + bias) for x [..., columns] and bias [columns] or None."""
    _check_bias_gelu(x, bias)
    if not native.takes(x) or x.numel() == 0:
        added = x if bias is None else x + bias
        return torch.nn.functional.gelu(added, approximate=GELU).contiguous()
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if bias is not None:
        bias = bias.contiguous()
    torch.ops.megalite._bias_gelu(native.as_rows(x), bias, None, out=native.as_rows(y))
    return y


@native.operator("bias_gelu_backward")
def bias_gelu_backward(
    grad: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """The gradient of x + bias, from the gradient of the output."""
    if not native.takes(x) or x.numel() == 0:
        added = x if bias is None else x + bias
        return torch.ops.aten.gelu_backward(grad, added, approximate=GELU).contiguous()
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    if bias is not None:
        bias = bias.contiguous()
    torch.ops.megalite._bias_gelu(
        native.as_rows(x), bias, native.as_rows(grad), out=native.as_rows(dx)
    )
    return dx


def _check_bias_gelu(x: torch.Tensor, bias: torch.Tensor | None) -> None:
    if x.dim() == 0 or not x.is_floating_point():
        raise TypeError(
            f"bias_gelu takes floating-point tensors [..., columns], not {x.dtype} {tuple(x.shape)}"
        )
    if bias is not None and bias.shape != x.shape[-1:]:
        raise ValueError(f"the bias is {tuple(bias.shape)}, not {tuple(x.shape[-1:])}")
    if bias is not None and (bias.dtype != x.dtype or bias.device != x.device):
        raise TypeError(f"the bias is {bias.dtype} on {bias.device}, x is {x.dtype} on {x.device}")


@bias_gelu.register_fake
def _(x, bias):
    _check_bias_gelu(x, bias)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@bias_gelu_backward.register_fake
def _(grad, x, bias):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _bias_gelu_backward(ctx, grad):
    x, bias = ctx.saved_tensors
    dx = bias_gelu_backward(grad, x, bias)
    if bias is None:
        return dx, None
    return dx, torch.atleast_2d(dx).flatten(0, -2).sum(dim=0)


bias_gelu.register_autograd(
    _bias_gelu_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)


@native.operator("swiglu")
def swiglu(x: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up (Shazeer 2020) for x [..., 2 f], the gate in its first half: [..., f]."""
    _check_swiglu(x)
    y = _half(x)
    if not native.takes(x) or y.numel() == 0:
        gate, up = x.chunk(2, dim=-1)
        return (torch.nn.functional.silu(gate) * up).contiguous()
    torch.ops.megalite._swiglu(native.as_rows(x), None, native.as_rows(y))
    return y


@native.operator("swiglu_backward")
def swiglu_backward(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The gradient of x, from the gradient of the output."""
    if not native.takes(x) or x.numel() == 0:
        gate, up = x.chunk(2, dim=-1)
        d_gate = torch.ops.aten.silu_backward(grad * up, gate)
        return torch.cat([d_gate, grad * torch.nn.functional.silu(gate)], dim=-1).contiguous()
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    torch.ops.megalite._swiglu(native.as_rows(x), native.as_rows(grad), native.as_rows(dx))
    return dx


def _check_swiglu(x: torch.Tensor) -> None:
    if x.dim() == 0 or not x.is_floating_point():
        raise TypeError(
            f"swiglu takes floating-point tensors [..., 2 f], not {x.dtype} {tuple(x.shape)}"
        )
    if x.shape[-1] % 2:
        raise ValueError(f"swiglu takes gate and up in one tensor [..., 2 f], not {tuple(x.shape)}")


def _half(x: torch.Tensor) -> torch.Tensor:
    """An empty tensor with half the columns."""
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


@swiglu.register_fake
def _(x):
    _check_swiglu(x)
    return _half(x)


@swiglu_backward.register_fake
def _(grad, x):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


swiglu.register_autograd(
    lambda ctx, grad: swiglu_backward(grad, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)
