"""The local parts of cross-entropy over a vocabulary that ranks share: no copy of the logits, none
in fp32.

Ranks exchange statistics between the two operators, so neither has an autograd formula of its own;
nn/loss.py has one for both.
"""

import torch
from torch import Tensor

from megalite.kernels import native

Statistics = tuple[Tensor, Tensor, Tensor]


def _statistics_output(logits: Tensor, labels: Tensor, valid: int) -> Statistics:
    """Three empty tensors with a number for each label. Raises ValueError for other arguments than
    logits [..., v] and labels [...]."""
    if logits.dim() < 2 or not logits.is_floating_point() or not 0 <= valid <= logits.shape[-1]:
        raise ValueError(
            "cross-entropy takes floating-point logits [..., v] with 0 <= valid <= v, "
            f"not {logits.dtype} {tuple(logits.shape)} with valid = {valid}"
        )
    shape = logits.shape[:-1]
    if (labels.shape, labels.dtype, labels.device) != (shape, torch.int64, logits.device):
        raise ValueError(
            f"labels are int64 {tuple(shape)} on {logits.device}, "
            f"not {labels.dtype} {tuple(labels.shape)} on {labels.device}"
        )
    empty = logits.new_empty(shape, dtype=native.sums_dtype(logits))
    return empty, torch.empty_like(empty), torch.empty_like(empty)


def _local(labels: Tensor, valid: int) -> tuple[Tensor, Tensor]:
    """Which labels belong to another rank [...], and the labels [..., 1], those replaced by 0."""
    elsewhere = (labels < 0) | (labels >= valid)
    return elsewhere, labels.masked_fill(elsewhere, 0).unsqueeze(-1)


@native.operator("cross_entropy_statistics", _statistics_output)
def cross_entropy_statistics(logits: Tensor, labels: Tensor, valid: int) -> Statistics:
    """Statistics of each row over the first `valid` columns of logits [..., v].

    Returns three tensors [...], fp32 or, for fp64 logits, fp64: the largest logit `top`, the sum of
    exp(logit - top), and the label's logit. A label outside of 0 .. valid - 1 belongs to another
    rank: its logit is 0 here.
    """
    top, total, target = _statistics_output(logits, labels, valid)
    if labels.numel() == 0 or valid == 0:
        return top.fill_(float("-inf")), total.zero_(), target.zero_()
    if native.takes(logits):
        torch.ops.megalite._cross_entropy_forward(
            native.as_rows(logits), labels.contiguous(), valid, top=top, sum=total, target=target
        )
        return top, total, target
    x = logits[..., :valid].to(top.dtype)
    top = x.amax(dim=-1)
    elsewhere, local = _local(labels, valid)
    target = x.gather(-1, local).squeeze(-1).masked_fill(elsewhere, 0.0)
    # A row of -inf: exp(-inf - 0) is 0 where exp(-inf + inf) would be NaN.
    shift = top.masked_fill(top == float("-inf"), 0)
    return top, (x - shift.unsqueeze(-1)).exp_().sum(dim=-1), target


def _check_gradient(logits: Tensor, labels: Tensor, valid: int, lse: Tensor, grad: Tensor) -> None:
    """Raise ValueError for what cross_entropy_gradient_ cannot take."""
    like, _, _ = _statistics_output(logits, labels, valid)
    for name, t in (("lse", lse), ("grad", grad)):
        if (t.shape, t.dtype, t.device) != (like.shape, like.dtype, like.device):
            raise ValueError(
                f"{name} is {t.dtype} {tuple(t.shape)}, not {like.dtype} {tuple(like.shape)}"
            )


@native.operator("cross_entropy_gradient_", _check_gradient, mutates=("logits",))
def cross_entropy_gradient_(
    logits: Tensor, labels: Tensor, valid: int, lse: Tensor, grad: Tensor
) -> None:
    """Overwrite the logits with their gradient, (softmax - [column is label]) * grad.

    lse: log of the sum of exp over the vocabulary of all ranks, [...]; grad: that of the loss,
    [...].
    """
    _check_gradient(logits, labels, valid, lse, grad)
    if logits.numel() == 0:
        return
    if native.takes(logits) and logits.is_contiguous():
        lse = lse.contiguous()
        grad = grad.contiguous()
        torch.ops.megalite._cross_entropy_backward(
            native.as_rows(logits), labels.contiguous(), valid, lse=lse, grad=grad
        )
        return
    x = (logits[..., :valid].to(lse.dtype) - lse.unsqueeze(-1)).exp_().mul_(grad.unsqueeze(-1))
    if valid:
        elsewhere, local = _local(labels, valid)
        x.scatter_add_(-1, local, -grad.masked_fill(elsewhere, 0.0).unsqueeze(-1))
    logits[..., :valid] = x.to(logits.dtype)
    logits[..., valid:] = 0
