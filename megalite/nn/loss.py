"""Cross-entropy over a vocabulary that is split over tensor-parallel ranks; no rank ever holds all
logits."""

import torch

from megalite.kernels.cross_entropy import cross_entropy_gradient_, cross_entropy_statistics
from megalite.nn.parameter import ParameterSpec
from megalite.parallel.collectives import Group, all_reduce


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, start, valid, group):
        local = labels - start
        own_top, total, target = cross_entropy_statistics(logits, local, valid)
        top = own_top.clone()
        all_reduce(top, group, op="max")
        sums = torch.stack([target, total * (own_top - top).exp()])
        all_reduce(sums, group)
        target, log_total = sums[0], sums[1].log()
        ctx.save_for_backward(logits, local, top + log_total)
        ctx.valid = valid
        return log_total - (target - top)

    @staticmethod
    def backward(ctx, grad):
        logits, local, lse = ctx.saved_tensors
        # In place: logits are the largest tensor of the model, and nothing else needs them.
        logits = logits.detach()
        cross_entropy_gradient_(logits, local, ctx.valid, lse, grad)
        return logits, None, None, None, None


def vocab_parallel_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, weight: ParameterSpec, group: Group
) -> torch.Tensor:
    """-log softmax(logits)[label] for every token: logits [..., v/t], labels [...] -> losses [...].

    Computed in fp32 for half precisions, in the logits' own dtype otherwise; the backward
    overwrites the logits. `weight` is the spec of the output weight: its box says which entries
    these logits are for; padding counts for nothing.
    """
    return _VocabParallelCrossEntropy.apply(
        logits, labels, weight.box.offset[0], weight.box.shape[0], group
    )


@torch.no_grad()
def vocab_parallel_argmax(
    logits: torch.Tensor, weight: ParameterSpec, group: Group
) -> torch.Tensor:
    """The entry with the largest logit, the first of several: logits [..., v/t] -> int64 [...].
    `weight` as above."""
    start, valid = weight.box.offset[0], weight.box.shape[0]
    if valid == 0:  # a rank of padding only
        top = torch.full_like(logits[..., 0], float("-inf"))
        entry = torch.full(top.shape, weight.global_shape[0], device=logits.device)
    else:
        top, entry = logits[..., :valid].max(dim=-1)
        entry += start
    best = top.clone(memory_format=torch.contiguous_format)
    all_reduce(best, group, op="max")
    entry = torch.where(top == best, entry, weight.global_shape[0]).contiguous()
    all_reduce(entry, group, op="min")
    return entry
