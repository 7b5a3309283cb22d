"""The local parts of cross-entropy over a vocabulary that ranks share: no copy of the logits, none
in fp32.

Ranks exchange statistics between the two operators, so neither has an autograd formula of its own;
nn/loss.py has one for both.
"""

import torch

from megalite.kernels import native


def _wide(logits: torch.Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _outputs(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Three empty tensors with a number for each label."""
    empty = torch.empty(labels.shape, dtype=_wide(logits), device=logits.device)
    return empty, torch.empty_like(empty), torch.empty_like(empty)


def _check(logits: torch.Tensor, labels: torch.Tensor, valid: int) -> None:
    if logits.dim() < 2 or not logits.is_floating_point() or not 0 <= valid <= logits.shape[-1]:
        raise ValueError(
            "cross-entropy takes floating-point logits [..., v] with 0 <= valid <= v, "
            f"not {logits.dtype} {tuple(logits.shape)} with valid = {valid}"
        )
    if (
        labels.shape != logits.shape[:-1]
        or labels.dtype != torch.int64
        or labels.device != logits.device
    ):
        raise ValueError(
            f"labels are int64 {tuple(logits.shape[:-1])} on {logits.device}, "
            f"not {labels.dtype} {tuple(labels.shape)} on {labels.device}"
        )


@native.operator("cross_entropy_statistics")
def cross_entropy_statistics(
    logits: torch.Tensor, labels: torch.Tensor, valid: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Statistics of each row over the first `valid` columns of logits [..., v].

    Returns three tensors [...], fp32 or, for fp64 logits, fp64: the largest logit `top`, the sum of
    exp(logit - top), and the label's logit. A label outside of 0 .. valid - 1 belongs to another
    rank: its logit is 0 here.
    """
    _check(logits, labels, valid)
    top, total, target = _outputs(logits, labels)
    if labels.numel() == 0 or valid == 0:
        return top.fill_(float("-inf")), total.zero_(), target.zero_()
    if native.takes(logits):
        torch.ops.megalite._cross_entropy_forward(
            native.as_rows(logits), labels.contiguous(), valid, top=top, sum=total, target=target
        )
        return top, total, target
    x = logits[..., :valid].to(top.dtype)
    top = x.amax(dim=-1)
    elsewhere = (labels < 0) | (labels >= valid)
    local = labels.masked_fill(elsewhere, 0).unsqueeze(-1)
    target = x.gather(-1, local).squeeze(-1).masked_fill(elsewhere, 0.0)
    # A row of -inf: exp(-inf - 0) is 0 where exp(-inf + inf) would be NaN.
    shift = top.masked_fill(top == float("-inf"), 0)
    return top, (x - shift.unsqueeze(-1)).exp_().sum(dim=-1), target


@native.operator("cross_entropy_gradient_", mutates=("logits",))
def cross_entropy_gradient_(
    logits: torch.Tensor, labels: torch.Tensor, valid: int, lse: torch.Tensor, grad: torch.Tensor
) -> None:
    """Overwrite the logits with their gradient, (softmax - [column is label]) * grad.

    lse: log of the sum of exp over the vocabulary of all ranks, [...]; grad: that of the loss,
    [...].
    """
    _check(logits, labels, valid)
    for name, t in (("lse", lse), ("grad", grad)):
        if t.shape != labels.shape or t.dtype != _wide(logits) or t.device != logits.device:
            raise ValueError(
                f"{name} is {t.dtype} {tuple(t.shape)}, not {_wide(logits)} {tuple(labels.shape)}"
            )
    if logits.numel() == 0:
        return
    if native.takes(logits) and logits.is_contiguous():
        torch.ops.megalite._cross_entropy_backward(
            native.as_rows(logits),
            labels.contiguous(),
            valid,
            lse=lse.contiguous(),
            grad=grad.contiguous(),
        )
        return
    x = (logits[..., :valid].to(lse.dtype) - lse.unsqueeze(-1)).exp_().mul_(grad.unsqueeze(-1))
    elsewhere = (labels < 0) | (labels >= valid)
    if valid:
        local = labels.masked_fill(elsewhere, 0).unsqueeze(-1)
        x.scatter_add_(-1, local, -grad.masked_fill(elsewhere, 0.0).unsqueeze(-1))
    logits[..., :valid] = x.to(logits.dtype)
    logits[..., valid:] = 0


@cross_entropy_statistics.register_fake
def _(logits, labels, valid):
    _check(logits, labels, valid)
    return _outputs(logits, labels)


@cross_entropy_gradient_.register_fake
def _(logits, labels, valid, lse, grad):
    _check(logits, labels, valid)
