"""Vocabulary-parallel cross-entropy and argmax: each tensor rank holds the logits of its shard."""

import torch
from torch import Tensor

from megalite.kernels.cross_entropy import cross_entropy_gradient_, cross_entropy_statistics
from megalite.nn.parameter import ParameterSpec
from megalite.parallel.collectives import Group, all_reduce


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """Logits [..., v/t] and labels [...] -> losses [...]: log sum_j exp(x_j) - x_label, with the
    global maximum `top` subtracted from all logits (Shoeybi et al. 2019, section 3)."""

    @staticmethod
    def forward(ctx, logits, labels, start, valid, group):
        # Of this rank's logits, [...] each: the maximum, the sum of exp(logit - maximum), and the
        # label's logit, which is 0 on the ranks that do not hold the label.
        local = labels - start
        own_top, total, target = cross_entropy_statistics(logits, local, valid)
        # Of all ranks' logits: sums over ranks, with exponentials relative to the global maximum.
        top = own_top.clone()
        all_reduce(top, group, op="max")
        sums = torch.stack([target, total * (own_top - top).exp()])
        all_reduce(sums, group)
        target = sums[0]
        log_total = sums[1].log()
        ctx.save_for_backward(logits, local, top + log_total)
        ctx.valid = valid
        return log_total - (target - top)

    @staticmethod
    def backward(ctx, grad):
        logits, local, lse = ctx.saved_tensors
        # In place: logits are the largest tensor of the model, and nothing else uses them.
        logits = logits.detach()
        cross_entropy_gradient_(logits, local, ctx.valid, lse, grad)
        return logits, None, None, None, None


def vocab_parallel_cross_entropy(
    logits: Tensor, labels: Tensor, weight: ParameterSpec, group: Group
) -> Tensor:
    """-log softmax(logits)[label] of every token: logits [..., v/t], labels [...] -> losses [...].

    Computed in fp32 for half precisions, in the logits' own dtype otherwise. The backward
    overwrites the logits.

    `weight` is the spec of the output weight. Its box says which vocabulary entries the logits
    belong to; logits of vocabulary padding are ignored.
    """
    return _VocabParallelCrossEntropy.apply(
        logits, labels, weight.box.offset[0], weight.box.shape[0], group
    )


@torch.no_grad()
def vocab_parallel_argmax(logits: Tensor, weight: ParameterSpec, group: Group) -> Tensor:
    """The vocabulary entry with the largest logit: logits [..., v/t] -> int64 [...].

    Of several equal ones, the first. `weight` is the spec of the output weight. Its box says which
    vocabulary entries the logits belong to; logits of vocabulary padding are ignored.
    """
    start = weight.box.offset[0]
    valid = weight.box.shape[0]
    # The largest logit of this rank's entries.
    if valid == 0:  # a rank with vocabulary padding only
        top = torch.full_like(logits[..., 0], float("-inf"))
        entry = torch.full(top.shape, weight.global_shape[0], device=logits.device)
    else:
        top, entry = logits[..., :valid].max(dim=-1)
        entry += start
    # The largest of all ranks, and the first entry that has it.
    best = top.clone(memory_format=torch.contiguous_format)
    all_reduce(best, group, op="max")
    entry = torch.where(top == best, entry, weight.global_shape[0]).contiguous()
    all_reduce(entry, group, op="min")
    return entry
