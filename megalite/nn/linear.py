"""Linear layers split over tensor-parallel ranks (Shoeybi et al. 2019), also with sequence
parallelism (Korthikanti et al. 2022).

Shapes: s sequence, b microbatch, h width in, f width out, t tensor-parallel size. Inputs and
outputs are [s, b, width].
"""

import math

import torch
from torch import Tensor, nn

from megalite.nn.settings import LayerSettings
from megalite.nn.weight_gradient import weight_gradient
from megalite.parallel.boxes import Box, split
from megalite.parallel.collectives import Group, all_gather, all_reduce, reduce_scatter


def _linear_weight_gradient(weight: nn.Parameter, grad: Tensor, x: Tensor) -> Tensor | None:
    """The gradient of a weight [..., h] from grad [s, b, f] and x [s, b, h]: None where `main_grad`
    collects it.

    Accumulating inside the product saves a pass over the weights, and rounds once to fp32 where a
    bf16 gradient would round at every microbatch.
    """
    grad = grad.reshape(-1, grad.shape[-1])  # [s b, f]
    x = x.reshape(-1, x.shape[-1])  # [s b, h]

    def product(main: Tensor | None) -> Tensor:
        if main is None:
            return (grad.t() @ x).view_as(weight)
        main = main.view(grad.shape[1], x.shape[1])
        if main.dtype == grad.dtype:
            return main.addmm_(grad.t(), x)
        if grad.is_cuda:
            return main.add_(torch.mm(grad.t(), x, out_dtype=main.dtype))
        return main.addmm_(grad.t().to(main.dtype), x.to(main.dtype))

    return weight_gradient(weight, product)


class _ColumnParallel(torch.autograd.Function):
    """[s, b, h] (or [s/t, b, h], gathered first) -> [s, b, f/t]."""

    @staticmethod
    def forward(ctx, x, weight, bias, group, sequence_parallel):
        ctx.save_for_backward(x)
        ctx.weight = weight
        ctx.group = group
        ctx.sequence_parallel = sequence_parallel
        ctx.bias_shape = None if bias is None else bias.shape
        # Not saved: the backward gathers it again, which costs time and saves (t - 1)/t of it.
        whole = all_gather(x.contiguous(), group) if sequence_parallel else x  # [s, b, h]
        flat_bias = None if bias is None else bias.view(-1)
        return nn.functional.linear(whole, weight.view(-1, x.shape[-1]), flat_bias)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        weight = ctx.weight
        group = ctx.group
        # Each collective runs while the product that does not need its result is computed.
        if ctx.sequence_parallel:
            x, gathering = all_gather(x.contiguous(), group, async_op=True)
        grad_x = grad @ weight.view(grad.shape[-1], -1)
        if ctx.sequence_parallel:
            gathering.wait()
            grad_x, reducing = reduce_scatter(grad_x, group, async_op=True)
        else:
            reducing = all_reduce(grad_x, group, async_op=True)
        grad_weight = grad_bias = None
        # A frozen weight has no gradient: a fine-tuned head on a fixed encoder.
        if ctx.needs_input_grad[1]:
            grad_weight = _linear_weight_gradient(weight, grad, x)
        if ctx.bias_shape is not None:
            grad_bias = grad.sum(dim=tuple(range(grad.dim() - 1))).view(ctx.bias_shape)
        reducing.wait()
        return grad_x, grad_weight, grad_bias, None, None


class _RowParallel(torch.autograd.Function):
    """[s, b, h/t] -> [s, b, f] summed over the group (or its part [s/t, b, f])."""

    @staticmethod
    def forward(ctx, x, weight, group, sequence_parallel):
        ctx.save_for_backward(x)
        ctx.weight = weight
        ctx.group = group
        ctx.sequence_parallel = sequence_parallel
        y = x @ weight.t()  # [s, b, f], of this rank's share of h only
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
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = _linear_weight_gradient(ctx.weight, grad, x)
        return grad_x, grad_weight, None, None


def column_parallel_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, group: Group, sequence_parallel: bool = False
) -> Tensor:
    """x W^T + b with W's leading dims split over the group: [..., h] -> [..., f/t].

    `weight` is [..., h] and `bias` [...], flattened to f/t rows. With `sequence_parallel`, x is
    [s/t, b, h]. The backward overlaps its all-reduce (reduce-scatter) with the weight-gradient
    product.
    """
    return _ColumnParallel.apply(x, weight, bias, group, sequence_parallel)


class ColumnParallelLinear(nn.Module):
    """A linear layer whose output features are split over tensor-parallel ranks.

    Args:
        settings: what all layers share.
        in_features: h.
        features: the global output shape, for example (g, q + 2, d) for a fused query, key and
            value projection.
        axis: the dim of `features` that is split.
        bias: whether it has a bias; None: as the model's other layers.
    """

    def __init__(
        self,
        settings: LayerSettings,
        in_features: int,
        features: tuple[int, ...],
        axis: int = 0,
        bias: bool | None = None,
    ):
        super().__init__()
        self.group = group = settings.tensor
        self.sequence_parallel = settings.sequence_parallel
        offset = [0] * len(features)
        shape = list(features)
        length = features[axis]
        offset[axis], shape[axis] = split(length, group.size, group.rank)
        # Input features come last, and every rank has all of them.
        box = Box((*offset, 0), (*shape, in_features))
        std = settings.model.init_method_std
        self.weight = settings.parameter((*features, in_features), "normal", std, box=box)
        self.bias = None
        if settings.bias if bias is None else bias:
            box = Box(tuple(offset), tuple(shape))
            self.bias = settings.parameter(features, "zeros", box=box)

    def forward(self, x: Tensor) -> Tensor:
        """[s, b, h] (or [s/t, b, h] under sequence parallelism) -> [s, b, f/t]."""
        return column_parallel_linear(x, self.weight, self.bias, self.group, self.sequence_parallel)


class ReplicatedLinear(nn.Module):
    """A linear layer with the whole weight on every tensor-parallel rank. All compute the same
    result from the same input [..., h].

    Args:
        settings: what all layers share.
        in_features: h.
        out_features: f.
        bias: whether it has a bias; None: as the model's other layers.
    """

    def __init__(
        self, settings: LayerSettings, in_features: int, out_features: int, bias: bool | None = None
    ):
        super().__init__()
        std = settings.model.init_method_std
        # The column-parallel product also adds the weight's gradient to main_grad, which F.linear
        # would not. In a group of this rank alone its collectives do nothing.
        self.alone = Group((settings.context.rank,), 0)
        self.weight = settings.parameter((out_features, in_features), "normal", std)
        self.bias = None
        if settings.bias if bias is None else bias:
            self.bias = settings.parameter((out_features,), "zeros")

    def forward(self, x: Tensor) -> Tensor:
        """[..., h] -> [..., f]."""
        return column_parallel_linear(x, self.weight, self.bias, self.alone)


class RowParallelLinear(nn.Module):
    """A linear layer whose input features are split over tensor-parallel ranks.

    Its bias is left for the caller to add, after the sum over ranks, together with dropout and the
    residual.

    Args:
        settings: what all layers share.
        in_features: h, over all ranks.
        out_features: f.
    """

    def __init__(self, settings: LayerSettings, in_features: int, out_features: int):
        super().__init__()
        self.group = settings.tensor
        self.sequence_parallel = settings.sequence_parallel
        start, size = split(in_features, self.group.size, self.group.rank)
        # Output features are whole; the sum over ranks completes the product.
        box = Box((0, start), (out_features, size))
        # What writes to the residual stream starts smaller by sqrt(2 L) (Radford et al. 2019).
        std = settings.model.init_method_std / math.sqrt(2 * settings.model.num_layers)
        self.weight = settings.parameter((out_features, in_features), "normal", std, box=box)
        self.bias = None
        if settings.bias:
            self.bias = settings.parameter((out_features,), "zeros", on_part=True)

    def forward(self, x: Tensor) -> Tensor:
        """[s, b, h/t] -> [s, b, f] (or [s/t, b, f] under sequence parallelism), without the
        bias."""
        return _RowParallel.apply(x, self.weight, self.group, self.sequence_parallel)
