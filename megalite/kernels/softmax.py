"""Softmax of attention scores in one pass: scale, mask, softmax and dropout, forward and backward.

    y = dropout(softmax(scale * x))

over the visible columns of scores [b, n, s_q, s_k]. Columns that a query does not see give 0, and
so does every column of a query that sees none (where torch gives NaN). Sums are computed in fp32
(fp64 for fp64). Dropout is that of kernels.dropout.

Kept for the backward: without dropout the output, which the product with the values keeps anyway;
with dropout the scores and one number a row, from which the backward computes the softmax again.
"""

import torch
from torch import Tensor

from megalite.kernels import native
from megalite.kernels.dropout import Dropout, check_dropout


def scaled_softmax(x: Tensor, scale: float, dropout: Dropout | None = None) -> Tensor:
    """dropout(softmax(scale * x)) of scores [b, n, s_q, s_k]."""
    return _softmax(x, scale, mask=None, causal=False, dropout=dropout)


def scaled_causal_softmax(x: Tensor, scale: float, dropout: Dropout | None = None) -> Tensor:
    """dropout(softmax(scale * x)) of scores [b, n, s_q, s_k], where query i sees keys 0 to i
    only."""
    return _softmax(x, scale, mask=None, causal=True, dropout=dropout)


def scaled_masked_softmax(
    x: Tensor, scale: float, mask: Tensor, causal: bool = False, dropout: Dropout | None = None
) -> Tensor:
    """dropout(softmax(scale * x)) of scores [b, n, s_q, s_k], where a query sees the keys whose
    mask is true.

    mask: bool, of any shape that broadcasts to x's, such as [b, 1, 1, s_k] for padding or [b, 1,
    s_q, s_k]. causal: query i also sees none of the keys after i.
    """
    return _softmax(x, scale, mask=mask, causal=causal, dropout=dropout)


def _softmax(x, scale, mask, causal, dropout: Dropout | None) -> Tensor:
    if dropout is None or dropout.p == 0:
        return softmax(x, scale, mask, causal)[0]
    rows, samples, site_id, key, p = dropout
    return softmax(x, scale, mask, causal, rows, samples, site_id, *key, p)[0]


def _outputs(
    x, scale, mask=None, causal=False, rows=None, samples=None, site_id=0, key0=0, key1=0, p=0.0
) -> tuple[Tensor, Tensor]:
    """The empty outputs of softmax. Raises ValueError or TypeError for what it cannot take."""
    if x.dim() != 4:
        raise ValueError(f"softmax takes scores [b, n, s_q, s_k], not {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"softmax takes floating-point scores, not {x.dtype}")
    if mask is not None:
        if mask.dtype != torch.bool:
            raise TypeError(f"the mask is of {mask.dtype}, not bool (true: the query sees the key)")
        if mask.device != x.device:
            raise ValueError(f"the mask is on {mask.device}, the scores are on {x.device}")
        if not native.broadcasts(mask.shape, x.shape):
            raise ValueError(
                f"a mask {tuple(mask.shape)} does not broadcast to the scores {tuple(x.shape)}"
            )
    check_dropout(x, rows, samples, p)
    return native.empty_like(x), x.new_empty(x.shape[:-1], dtype=native.sums_dtype(x))


@native.operator("scaled_softmax", _outputs)
def softmax(
    x: Tensor,
    scale: float,
    mask: Tensor | None = None,
    causal: bool = False,
    rows: Tensor | None = None,
    samples: Tensor | None = None,
    site_id: int = 0,
    key0: int = 0,
    key1: int = 0,
    p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The operator of the three functions above.

    Returns the softmax, and the log of the sum of exp over each row's visible columns [b, n, s_q],
    which has no gradient.
    """
    y, lse = _outputs(x, scale, mask, rows=rows, samples=samples, p=p)
    if x.numel() == 0:
        return y, lse.fill_(float("inf"))
    dropout = Dropout(rows, samples, site_id, key=(key0, key1), p=p)
    if not _native_takes(x, dropout):
        return _composite(x, scale, mask, causal, dropout)
    arguments = dict(causal=causal, scale=scale, **dropout.for_kernels(x))
    mask = _native_mask(x, mask)
    torch.ops.megalite._softmax_forward(x.contiguous(), mask, **arguments, out=y, lse=lse)
    return y, lse


@native.operator("scaled_softmax_backward")
def softmax_backward(
    grad: Tensor,
    lse: Tensor,
    y: Tensor | None,
    x: Tensor | None,
    scale: float,
    mask: Tensor | None,
    causal: bool,
    rows: Tensor | None,
    samples: Tensor | None,
    site_id: int,
    key0: int,
    key1: int,
    p: float,
) -> Tensor:
    """The gradient of x: from the output y without dropout, from x and lse with it."""
    if grad.numel() == 0:
        return native.empty_like(grad)
    dropout = Dropout(rows, samples, site_id, key=(key0, key1), p=p)
    if not _native_takes(grad, dropout):
        if p > 0:
            y = (_scores(x, scale, mask, causal) - lse.unsqueeze(-1)).exp_()
        return _composite_backward(grad, lse, y, scale, dropout)
    x = native.contiguous(x)
    y = native.contiguous(y)
    arguments = dict(causal=causal, scale=scale, lse=lse.contiguous(), **dropout.for_kernels(grad))
    mask = _native_mask(grad, mask)
    grad = grad.contiguous()
    dx = torch.empty_like(grad)
    torch.ops.megalite._softmax_backward(grad, x, y, mask=mask, **arguments, out=dx)
    return dx


def _native_takes(x: Tensor, dropout: Dropout) -> bool:
    """Whether the kernels take these scores; a p above 0 that drops nothing still scales, which
    they do not do."""
    return native.takes(x) and (dropout.p == 0 or dropout.drops)


def _native_mask(x: Tensor, mask: Tensor | None) -> Tensor | None:
    """The mask as the kernels take it: with strides of 0 where it is broadcast over b, n or s_q,
    and contiguous keys."""
    if mask is None:
        return None
    if mask.dim() == 0 or mask.shape[-1] != x.shape[-1] or mask.stride(-1) != 1:
        mask = mask.expand(*mask.shape[:-1], x.shape[-1]).contiguous()
    return mask.expand(x.shape)


def _scores(x: Tensor, scale: float, mask: Tensor | None, causal: bool) -> Tensor:
    """scale * x in fp32 or fp64, -inf where a query does not see the key."""
    scores = x.to(native.sums_dtype(x)) * scale
    if causal:
        future = torch.ones(x.shape[-2:], dtype=torch.bool, device=x.device).triu_(1)
        scores.masked_fill_(future, float("-inf"))
    return scores if mask is None else scores.masked_fill_(~mask, float("-inf"))


def _composite(x, scale, mask, causal, dropout: Dropout) -> tuple[Tensor, Tensor]:
    """`softmax` by PyTorch's operations."""
    scores = _scores(x, scale, mask, causal)
    y = scores.softmax(dim=-1)
    lse = scores.logsumexp(dim=-1)
    # Queries that see no key.
    if mask is not None:
        visible = mask.expand(x.shape)
        if causal:
            visible = visible.tril()
        unseen = ~visible.any(dim=-1)
        y = y.masked_fill(unseen.unsqueeze(-1), 0)
        lse = lse.masked_fill(unseen, float("inf"))
    # A row of -inf that is visible is NaN.
    lse = torch.where(lse.isinf() & (lse < 0), float("nan"), lse)
    if dropout.p > 0:
        y = torch.where(dropout.keep(x), y * (1 / (1 - dropout.p)), 0)
    return y.to(x.dtype), lse


def _composite_backward(grad, lse, y, scale, dropout: Dropout) -> Tensor:
    """The gradient of the scores by PyTorch's operations; y: the softmax before dropout."""
    d = grad.to(lse.dtype)
    if dropout.p > 0:
        d = torch.where(dropout.keep(grad), d * (1 / (1 - dropout.p)), 0)
    y = y.to(lse.dtype)
    dx = y * (d - (y * d).sum(dim=-1, keepdim=True)) * scale
    return dx.to(grad.dtype).contiguous()


def _save(ctx, inputs, output):
    x, ctx.scale, mask, ctx.causal, rows, samples, *ctx.dropout = inputs
    y, lse = output
    if ctx.dropout[-1] > 0:
        ctx.save_for_backward(lse, None, x, mask, rows, samples)
    else:
        ctx.save_for_backward(lse, y, None, None, rows, samples)
    ctx.mark_non_differentiable(lse)


def _backward(ctx, grad, _):
    lse, y, x, mask, *numbers = ctx.saved_tensors
    dx = softmax_backward(grad, lse, y, x, ctx.scale, mask, ctx.causal, *numbers, *ctx.dropout)
    return dx, *[None] * 9


softmax.register_autograd(_backward, setup_context=_save)
