"""Softmax of attention scores in one pass: scale, mask, softmax and dropout, forward and backward.

    y = dropout(softmax(scale * x))

over the visible columns of scores [b, n, s_q, s_k]. Columns that a query does not see give 0, and
so does every column of a query that sees none (where torch gives NaN). Sums are computed in fp32
(fp64 for fp64). Dropout is that of kernels.dropout.

Kept for the backward: without dropout the output, which the product with the values keeps anyway;
with dropout the scores and one number a row, from which the backward computes the softmax again.
"""

from typing import NamedTuple

import torch

from megalite.kernels import native
from megalite.kernels.dropout import check_dropout, keep_mask


class Dropout(NamedTuple):
    """Dropout of a tensor by kernels.dropout: its probability, and the position of the tensor's
    rows."""

    rows: torch.Tensor
    """Row numbers, int64, broadcasting to the leading dims."""
    samples: torch.Tensor
    """Sample numbers, int64, broadcasting to the leading dims."""
    site_id: int
    key: tuple[int, int]
    p: float


def scaled_softmax(x: torch.Tensor, scale: float, dropout: Dropout | None = None) -> torch.Tensor:
    """dropout(softmax(scale * x)) of scores [b, n, s_q, s_k]."""
    return _softmax(x, scale, mask=None, causal=False, dropout=dropout)


def scaled_causal_softmax(
    x: torch.Tensor, scale: float, dropout: Dropout | None = None
) -> torch.Tensor:
    """dropout(softmax(scale * x)) of scores [b, n, s_q, s_k], where query i sees keys 0 to i
    only."""
    return _softmax(x, scale, mask=None, causal=True, dropout=dropout)


def scaled_masked_softmax(
    x: torch.Tensor,
    scale: float,
    mask: torch.Tensor,
    causal: bool = False,
    dropout: Dropout | None = None,
) -> torch.Tensor:
    """dropout(softmax(scale * x)) of scores [b, n, s_q, s_k], where a query sees the keys whose
    mask is true.

    mask: bool, of any shape that broadcasts to x's, such as [b, 1, 1, s_k] for padding or [b, 1,
    s_q, s_k]. causal: query i also sees none of the keys after i.
    """
    return _softmax(x, scale, mask=mask, causal=causal, dropout=dropout)


def _softmax(x, scale, mask, causal, dropout: Dropout | None) -> torch.Tensor:
    if dropout is None or dropout.p == 0:
        return softmax(x, scale, mask, causal=causal)[0]
    y, _ = softmax(
        x,
        scale,
        mask,
        causal=causal,
        rows=dropout.rows,
        samples=dropout.samples,
        site_id=dropout.site_id,
        key0=dropout.key[0],
        key1=dropout.key[1],
        p=dropout.p,
    )
    return y


@native.operator("scaled_softmax")
def softmax(
    x: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None = None,
    causal: bool = False,
    rows: torch.Tensor | None = None,
    samples: torch.Tensor | None = None,
    site_id: int = 0,
    key0: int = 0,
    key1: int = 0,
    p: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The operator of the three functions above.

    Returns the softmax, and the log of the sum of exp over each row's visible columns [b, n, s_q],
    which has no gradient.
    """
    _check(x, mask, rows, samples=samples, p=p)
    y, lse = _outputs(x)
    if x.numel() == 0:
        return y, lse.fill_(float("inf"))
    dropout = Dropout(rows, samples, site_id, key=(key0, key1), p=p)
    if not _native_takes(x, dropout):
        return _composite(x, scale, mask, causal=causal, dropout=dropout)
    torch.ops.megalite._softmax_forward(
        x.contiguous(),
        _native_mask(x, mask),
        causal,
        scale=scale,
        **_native_dropout(x, dropout),
        out=y,
        lse=lse,
    )
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
    site_id: int,
    key0: int,
    key1: int,
    p: float,
) -> torch.Tensor:
    """The gradient of x: from the output y without dropout, from x and lse with it."""
    if grad.numel() == 0:
        return torch.empty_like(grad, memory_format=torch.contiguous_format)
    dropout = Dropout(rows, samples, site_id, key=(key0, key1), p=p)
    if not _native_takes(grad, dropout):
        if p > 0:
            y = (_scores(x, scale, mask, causal=causal) - lse.unsqueeze(-1)).exp_()
        return _composite_backward(grad, lse, y, scale=scale, dropout=dropout)
    grad = grad.contiguous()
    result = torch.empty_like(grad)
    torch.ops.megalite._softmax_backward(
        grad,
        None if x is None else x.contiguous(),
        None if y is None else y.contiguous(),
        mask=_native_mask(grad, mask),
        causal=causal,
        scale=scale,
        **_native_dropout(grad, dropout),
        out=result,
        lse=lse.contiguous(),
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
    """Empty tensors for the softmax and for each row's log of the sum of exp."""
    sums = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, torch.empty(x.shape[:-1], dtype=sums, device=x.device)


def _drops(dropout: Dropout) -> bool:
    """Whether some 32-bit word is below the threshold."""
    return dropout.rows is not None and round(dropout.p * 2**32) > 0


def _native_takes(x: torch.Tensor, dropout: Dropout) -> bool:
    """Whether the kernels take these scores; a p above 0 that drops nothing still scales, which
    they do not do."""
    return native.takes(x) and (dropout.p == 0 or _drops(dropout))


def _native_mask(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor | None:
    """The mask as the kernels take it: with strides of 0 where it is broadcast over b, n or s_q,
    and contiguous keys."""
    if mask is None:
        return None
    if mask.dim() == 0 or mask.shape[-1] != x.shape[-1] or mask.stride(-1) != 1:
        mask = mask.expand(*mask.shape[:-1], x.shape[-1]).contiguous()
    return mask.expand(x.shape)


def _native_dropout(x: torch.Tensor, dropout: Dropout) -> dict:
    """The kernels' arguments for dropout."""
    if not _drops(dropout):
        return dict(rows=None, samples=None, place=0, key0=0, key1=0, limit=0, factor=1.0)
    return dict(
        rows=native.row_numbers(dropout.rows, x.shape[:-1]),
        samples=native.row_numbers(dropout.samples, x.shape[:-1]),
        **native.dropout_arguments(dropout.site_id, *dropout.key, p=dropout.p),
    )


def _scores(x: torch.Tensor, scale: float, mask: torch.Tensor | None, causal: bool) -> torch.Tensor:
    """scale * x in fp32 or fp64, -inf where a query does not see the key."""
    scores = x.to(_outputs(x[:0])[1].dtype) * scale
    if causal:
        future = torch.ones(x.shape[-2:], dtype=torch.bool, device=x.device).triu_(1)
        scores.masked_fill_(future, float("-inf"))
    return scores if mask is None else scores.masked_fill_(~mask, float("-inf"))


def _keep(x: torch.Tensor, dropout: Dropout) -> torch.Tensor:
    """Which of the scores are kept, of the shape of x."""
    rows, samples, site_id, key, p = dropout
    return keep_mask(rows, samples, x.shape[-1], site_id=site_id, key=key, p=p).expand(x.shape)


def _composite(x, scale, mask, causal, dropout: Dropout) -> tuple[torch.Tensor, torch.Tensor]:
    """`softmax` by PyTorch's operations."""
    scores = _scores(x, scale, mask, causal=causal)
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
        y = torch.where(_keep(x, dropout), y * (1 / (1 - dropout.p)), 0)
    return y.to(x.dtype), lse


def _composite_backward(grad, lse, y, scale, dropout: Dropout) -> torch.Tensor:
    """The gradient of the scores by PyTorch's operations; y: the softmax before dropout."""
    d = grad.to(lse.dtype)
    if dropout.p > 0:
        d = torch.where(_keep(grad, dropout), d * (1 / (1 - dropout.p)), 0)
    y = y.to(lse.dtype)
    dx = y * (d - (y * d).sum(dim=-1, keepdim=True)) * scale
    return dx.to(grad.dtype).contiguous()


@softmax.register_fake
def _(x, scale, mask=None, causal=False, rows=None, samples=None, site_id=0, key0=0, key1=0, p=0.0):
    _check(x, mask, rows, samples=samples, p=p)
    return _outputs(x)


@softmax_backward.register_fake
def _(grad, lse, y, x, scale, mask, causal, rows, samples, site_id, key0, key1, p):
    return torch.empty_like(grad, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output):
    x, ctx.scale, mask, ctx.causal, rows, samples, *ctx.dropout = inputs
    y, lse = output
    if ctx.dropout[-1] > 0:
        ctx.save_for_backward(lse, None, x, mask, rows, samples)
    else:
        ctx.save_for_backward(lse, y, None, None, rows, samples)
    ctx.mark_non_differentiable(lse)


def _backward(ctx, grad, _):
    lse, y, x, mask, rows, samples = ctx.saved_tensors
    site_id, key0, key1, p = ctx.dropout
    dx = softmax_backward(
        grad,
        lse,
        y,
        x=x,
        scale=ctx.scale,
        mask=mask,
        causal=ctx.causal,
        rows=rows,
        samples=samples,
        site_id=site_id,
        key0=key0,
        key1=key1,
        p=p,
    )
    return dx, *[None] * 9


softmax.register_autograd(_backward, setup_context=_save)
