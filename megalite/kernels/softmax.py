"""Softmax of attention scores in one pass: scale, mask, softmax and dropout, forward and backward.

    y = dropout(softmax(scale * x))

over the visible columns of scores [b, n, s_q, s_k]; columns that a query does not see give 0, and so does every column
of a query that sees none (where torch gives NaN). Sums are taken in fp32 (fp64 for fp64). Dropout is that of
kernels.dropout.

Kept for the backward: without dropout the output, which the product with the values keeps anyway; with dropout the
scores and one number a row, from which the softmax is made again.
"""

from typing import NamedTuple

import torch

from megalite.kernels import native
from megalite.kernels.dropout import check_dropout, keep_mask


class Dropout(NamedTuple):
    """Where the dropout of a tensor is (kernels.dropout): rows and samples broadcast to its leading dims."""

    rows: torch.Tensor
    samples: torch.Tensor
    place: int
    key: tuple[int, int]
    p: float


def scaled_softmax(x: torch.Tensor, scale: float, dropout: Dropout | None = None) -> torch.Tensor:
    """dropout(softmax(scale * x)) of scores [b, n, s_q, s_k]."""
    return _softmax(x, scale, None, False, dropout)


def scaled_causal_softmax(
    x: torch.Tensor, scale: float, dropout: Dropout | None = None
) -> torch.Tensor:
    """The same where query i sees keys 0 to i only."""
    return _softmax(x, scale, None, True, dropout)


def scaled_masked_softmax(
    x: torch.Tensor,
    scale: float,
    mask: torch.Tensor,
    causal: bool = False,
    dropout: Dropout | None = None,
) -> torch.Tensor:
    """The same where a query sees the keys for which the mask is true: bool, of any shape that broadcasts to x's, such
    as [b, 1, 1, s_k] for padding or [b, 1, s_q, s_k]; and when causal none that comes after it."""
    return _softmax(x, scale, mask, causal, dropout)


def _softmax(x, scale, mask, causal, dropout) -> torch.Tensor:
    if dropout is None or dropout.p == 0:
        return softmax(x, scale, mask, causal)[0]
    rows, samples, place, key, p = dropout
    return softmax(x, scale, mask, causal, rows, samples, place, *key, p)[0]


@native.operator("scaled_softmax")
def softmax(
    x: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None = None,
    causal: bool = False,
    rows: torch.Tensor | None = None,
    samples: torch.Tensor | None = None,
    place: int = 0,
    key0: int = 0,
    key1: int = 0,
    p: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(the softmax, log of the sum of exp over each row's visible columns [b, n, s_q]); the second has no gradient."""
    _check(x, mask, rows, samples, p)
    y, lse = _outputs(x)
    if x.numel() == 0:
        return y, lse.fill_(float("inf"))
    drop = rows is not None and round(p * 2**32) > 0
    if not native.takes(x) or (p > 0 and not drop):
        return _composite(x, scale, mask, causal, rows, samples, place, key0, key1, p)
    dropout = _native_dropout(x, rows if drop else None, samples, place, key0, key1, p)
    mask = _native_mask(x, mask)
    torch.ops.megalite._softmax_forward(x.contiguous(), mask, causal, scale, *dropout, y, lse)
    return y, lse


@native.operator("scaled_softmax_backward")
def softmax_backward(
    grad: torch.Tensor,
    lse: torch.Tensor,
    y: torch.Tensor | None,
    x: torch.Tensor | None,
    scale: float,
    mask: torch.Tensor | None,
    causal: bool,
    rows: torch.Tensor | None,
    samples: torch.Tensor | None,
    place: int,
    key0: int,
    key1: int,
    p: float,
) -> torch.Tensor:
    """The gradient of x: from the output y without dropout, from x and lse with it."""
    if grad.numel() == 0:
        return torch.empty_like(grad, memory_format=torch.contiguous_format)
    drop = rows is not None and round(p * 2**32) > 0
    if not native.takes(grad) or (p > 0 and not drop):
        return _composite_backward(
            grad, lse, y, x, scale, mask, causal, rows, samples, place, key0, key1, p
        )
    grad = grad.contiguous()
    dropout = _native_dropout(grad, rows if drop else None, samples, place, key0, key1, p)
    result, mask = torch.empty_like(grad), _native_mask(grad, mask)
    x, y = (None if t is None else t.contiguous() for t in (x, y))
    torch.ops.megalite._softmax_backward(
        grad, x, y, mask, causal, scale, *dropout, result, lse.contiguous()
    )
    return result


def _check(x, mask, rows, samples, p) -> None:
    """Raise ValueError or TypeError for what the kernels cannot take."""
    if x.dim() != 4:
        raise ValueError(f"softmax takes scores [b, n, s_q, s_k], not {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"softmax takes floating-point scores, not {x.dtype}")
    if mask is not None:
        if mask.dtype != torch.bool:
            raise TypeError(f"the mask is of {mask.dtype}, not bool (true: the query sees the key)")
        if mask.device != x.device:
            raise ValueError(f"the mask is on {mask.device}, the scores are on {x.device}")
        if mask.dim() > 4 or any(m not in (1, s) for m, s in zip(mask.shape[::-1], x.shape[::-1])):
            raise ValueError(
                f"a mask {tuple(mask.shape)} does not broadcast to the scores {tuple(x.shape)}"
            )
    check_dropout(x, rows, samples, p)


def _outputs(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    sums = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, torch.empty(x.shape[:-1], dtype=sums, device=x.device)


def _native_mask(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor | None:
    """The mask as the kernels take it: strides 0 where it is broadcast over b, n or s_q, but neighbouring keys."""
    if mask is None:
        return None
    if mask.dim() == 0 or mask.shape[-1] != x.shape[-1] or mask.stride(-1) != 1:
        mask = mask.expand(*mask.shape[:-1], x.shape[-1]).contiguous()
    return mask.expand(x.shape)


def _native_dropout(x: torch.Tensor, rows, samples, place, key0, key1, p) -> tuple:
    if rows is None:
        return None, None, 0, 0, 0, 0, 1.0
    numbers = (native.row_numbers(part, x.shape[:-1]) for part in (rows, samples))
    return *numbers, *native.dropout_words(place, key0, key1, p)


def _scores(x: torch.Tensor, scale: float, mask: torch.Tensor | None, causal: bool) -> torch.Tensor:
    """scale * x in fp32 or more, -inf where a query does not see the key."""
    scores = x.to(_outputs(x[:0])[1].dtype) * scale
    if causal:
        scores.masked_fill_(
            torch.ones(x.shape[-2:], dtype=torch.bool, device=x.device).triu_(1), float("-inf")
        )
    return scores if mask is None else scores.masked_fill_(~mask, float("-inf"))


def _composite(
    x, scale, mask, causal, rows, samples, place, key0, key1, p
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = _scores(x, scale, mask, causal)
    y, lse = scores.softmax(dim=-1), scores.logsumexp(dim=-1)
    if mask is not None:
        visible = mask.expand(x.shape)
        unseen = ~(visible.tril() if causal else visible).any(dim=-1)
        y, lse = y.masked_fill(unseen.unsqueeze(-1), 0), lse.masked_fill(unseen, float("inf"))
    lse = torch.where(lse.isinf() & (lse < 0), float("nan"), lse)
    if p > 0:
        keep = keep_mask(rows, samples, x.shape[-1], place, (key0, key1), p).expand(x.shape)
        y = torch.where(keep, y * (1 / (1 - p)), 0)
    return y.to(x.dtype), lse


def _composite_backward(
    grad, lse, y, x, scale, mask, causal, rows, samples, place, key0, key1, p
) -> torch.Tensor:
    d = grad.to(lse.dtype)
    if p > 0:
        y = (_scores(x, scale, mask, causal) - lse.unsqueeze(-1)).exp_()
        keep = keep_mask(rows, samples, grad.shape[-1], place, (key0, key1), p).expand(grad.shape)
        d = torch.where(keep, d * (1 / (1 - p)), 0)
    y = y.to(lse.dtype)
    return (y * (d - (y * d).sum(dim=-1, keepdim=True)) * scale).to(grad.dtype).contiguous()


@softmax.register_fake
def _(x, scale, mask=None, causal=False, rows=None, samples=None, place=0, key0=0, key1=0, p=0.0):
    _check(x, mask, rows, samples, p)
    return _outputs(x)


@softmax_backward.register_fake
def _(grad, lse, y, x, scale, mask, causal, rows, samples, place, key0, key1, p):
    return torch.empty_like(grad, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output):
    x, ctx.scale, mask, ctx.causal, rows, samples, *ctx.dropout = inputs
    y, lse = output
    dropout = ctx.dropout[-1] > 0
    ctx.save_for_backward(lse, *(None, x, mask) if dropout else (y, None, None), rows, samples)
    ctx.mark_non_differentiable(lse)


def _backward(ctx, grad, _):
    lse, y, x, mask, rows, samples = ctx.saved_tensors
    dx = softmax_backward(grad, lse, y, x, ctx.scale, mask, ctx.causal, rows, samples, *ctx.dropout)
    return dx, *[None] * 9


softmax.register_autograd(_backward, setup_context=_save)
