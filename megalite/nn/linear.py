"""Linear layers split over tensor-parallel ranks (Shoeybi et al. 2019), also with sequence parallelism (Korthikanti
et al. 2022).

Shapes: s sequence, b microbatch, h width in, f width out, t tensor-parallel size. Inputs and outputs are [s, b, width].
"""

import torch
from torch import nn

from megalite.nn.parameter import ParameterSpec, make_parameter
from megalite.parallel.boxes import Box, split
from megalite.parallel.collectives import Group, all_gather, all_reduce, reduce_scatter
from megalite.parallel.context import ParallelContext


def _weight_gradient(
    weight: torch.Tensor, grad: torch.Tensor, x: torch.Tensor
) -> torch.Tensor | None:
    """grad^T x, added to `weight.main_grad` (and then None is returned) when the optimizer has attached one.

    Accumulating inside the product saves a pass over the weights, and rounds once to fp32 where a bf16 gradient
    would round at every microbatch.
    """
    grad, x = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
    main = getattr(weight, "main_grad", None)
    if main is None:
        return (grad.t() @ x).view_as(weight)
    main = main.view(grad.shape[1], x.shape[1])
    if main.dtype == grad.dtype:
        main.addmm_(grad.t(), x)
    elif grad.is_cuda:
        main.add_(torch.mm(grad.t(), x, out_dtype=main.dtype))
    else:
        main.addmm_(grad.t().to(main.dtype), x.to(main.dtype))
    return None


def _bias_gradient(grad: torch.Tensor, bias_shape: tuple[int, ...]) -> torch.Tensor:
    return grad.sum(dim=tuple(range(grad.dim() - 1))).view(bias_shape)


class _ColumnParallel(torch.autograd.Function):
    """[s, b, h] (or [s/t, b, h], gathered first) -> [s, b, f/t]."""

    @staticmethod
    def forward(ctx, x, weight, bias, group, sequence_parallel):
        ctx.save_for_backward(x)
        ctx.weight, ctx.group, ctx.sequence_parallel = weight, group, sequence_parallel
        ctx.bias_shape = None if bias is None else bias.shape
        whole = all_gather(x.contiguous(), group) if sequence_parallel else x
        return nn.functional.linear(
            whole, weight.view(-1, x.shape[-1]), None if bias is None else bias.view(-1)
        )

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        weight, group = ctx.weight, ctx.group
        # Each collective runs while the product that does not need its result is computed.
        if ctx.sequence_parallel:
            x, gathering = all_gather(x.contiguous(), group, async_op=True)
        grad_x = grad @ weight.view(grad.shape[-1], -1)
        if ctx.sequence_parallel:
            gathering.wait()
            grad_x, reducing = reduce_scatter(grad_x, group, async_op=True)
        else:
            reducing = all_reduce(grad_x, group, async_op=True)
        grad_weight = _weight_gradient(weight, grad, x) if ctx.needs_input_grad[1] else None
        grad_bias = _bias_gradient(grad, ctx.bias_shape) if ctx.bias_shape is not None else None
        reducing.wait()
        return grad_x, grad_weight, grad_bias, None, None


class _RowParallel(torch.autograd.Function):
    """[s, b, h/t] -> [s, b, f] summed over the group (or its part [s/t, b, f])."""

    @staticmethod
    def forward(ctx, x, weight, group, sequence_parallel):
        ctx.save_for_backward(x)
        ctx.weight, ctx.group, ctx.sequence_parallel = weight, group, sequence_parallel
        y = x @ weight.t()
        if sequence_parallel:
            return reduce_scatter(y, group)
        all_reduce(y, group)
        return y

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        if ctx.sequence_parallel:
            grad = all_gather(grad.contiguous(), ctx.group)
        grad_x = grad @ ctx.weight
        grad_weight = _weight_gradient(ctx.weight, grad, x) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, None, None


def column_parallel_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    group: Group,
    sequence_parallel: bool,
) -> torch.Tensor:
    """x W^T + b with W's leading dims split over the group: [..., h] -> [..., f/t].

    `weight` is [..., h] and `bias` [...], flattened to f/t rows. With `sequence_parallel`, x is [s/t, b, h].
    The backward overlaps its all-reduce (reduce-scatter) with the weight-gradient product.
    """
    return _ColumnParallel.apply(x, weight, bias, group, sequence_parallel and group.size > 1)


class ColumnParallelLinear(nn.Module):
    """A linear layer whose output features are split over tensor-parallel ranks along dim `split_dim` of its shape.

    `features` is the global output shape, for example (g, q + 2, d) for a fused query, key and value projection.
    """

    def __init__(
        self,
        in_features,
        features,
        split_dim,
        std,
        bias,
        context: ParallelContext,
        dtype,
        sequence_parallel,
    ):
        super().__init__()
        self.group, self.sequence_parallel = context.tensor, sequence_parallel
        start, size = split(features[split_dim], self.group.size, self.group.rank)
        offset, shape = [0] * len(features), list(features)
        offset[split_dim], shape[split_dim] = start, size

        def parameter(tail, init, std=0.0, weight_decay=True):
            box = Box((*offset, *(0 for _ in tail)), (*shape, *tail))
            spec = ParameterSpec((*features, *tail), box, True, init, std, weight_decay)
            return make_parameter(box.shape, spec, dtype, context.device)

        self.weight = parameter((in_features,), "normal", std)
        self.bias = parameter((), "zeros", weight_decay=False) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[s, b, h] (or [s/t, b, h] under sequence parallelism) -> [s, b, f/t]."""
        return column_parallel_linear(x, self.weight, self.bias, self.group, self.sequence_parallel)


class ReplicatedLinear(nn.Module):
    """A linear layer that every tensor-parallel rank holds whole, and computes alike, for whole rows."""

    def __init__(self, in_features, out_features, std, bias, context: ParallelContext, dtype):
        super().__init__()
        self.alone = Group((context.rank,), 0)

        def parameter(shape, init, std=0.0, weight_decay=True):
            spec = ParameterSpec(shape, Box.whole(shape), False, init, std, weight_decay)
            return make_parameter(shape, spec, dtype, context.device)

        self.weight = parameter((out_features, in_features), "normal", std)
        self.bias = parameter((out_features,), "zeros", weight_decay=False) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., h] -> [..., f]."""
        return column_parallel_linear(
            x, self.weight, self.bias, self.alone, sequence_parallel=False
        )


class RowParallelLinear(nn.Module):
    """A linear layer whose input features are split over tensor-parallel ranks. Its bias is left for the caller to add,
    after the sum over ranks, together with dropout and the residual."""

    def __init__(
        self,
        in_features,
        out_features,
        std,
        bias,
        context: ParallelContext,
        dtype,
        sequence_parallel,
    ):
        super().__init__()
        self.group, self.sequence_parallel = (
            context.tensor,
            sequence_parallel and context.tensor.size > 1,
        )
        start, size = split(in_features, self.group.size, self.group.rank)
        box = Box((0, start), (out_features, size))
        spec = ParameterSpec((out_features, in_features), box, True, "normal", std)
        self.weight = make_parameter(box.shape, spec, dtype, context.device)
        self.bias = None
        if bias:
            whole = Box.whole((out_features,))
            spec = ParameterSpec(
                (out_features,),
                whole,
                False,
                "zeros",
                weight_decay=False,
                sequence_partial=self.sequence_parallel,
            )
            self.bias = make_parameter((out_features,), spec, dtype, context.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[s, b, h/t] -> [s, b, f] (or [s/t, b, f] under sequence parallelism), without the bias."""
        return _RowParallel.apply(x, self.weight, self.group, self.sequence_parallel)
