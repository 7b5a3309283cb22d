"""Cross-entropy over a vocabulary that is split over tensor-parallel ranks; no rank ever holds all logits."""

import torch

from megalite.nn.parameter import ParameterSpec
from megalite.parallel.collectives import Group, all_reduce


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, start, valid, group):
        # Works in place: logits are the largest tensor of the model, and nothing else needs them.
        x = logits.detach()
        x = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        x[..., valid:] = float("-inf")
        top = x.amax(dim=-1)
        all_reduce(top, group, op="max")
        x.sub_(top.unsqueeze(-1))
        local = labels - start
        elsewhere = (local < 0) | (local >= valid)
        local = local.masked_fill(elsewhere, 0).unsqueeze(-1)
        target = x.gather(-1, local).squeeze(-1).masked_fill(elsewhere, 0.0)
        sums = torch.stack([target, x.exp_().sum(dim=-1)])
        all_reduce(sums, group)
        target, total = sums
        ctx.save_for_backward(x.div_(total.unsqueeze(-1)), local, elsewhere)
        ctx.dtype = logits.dtype
        return total.log() - target

    @staticmethod
    def backward(ctx, grad):
        probabilities, local, elsewhere = ctx.saved_tensors
        x = probabilities.mul_(grad.unsqueeze(-1))
        here = grad.masked_fill(elsewhere, 0.0)
        x.scatter_add_(-1, local, -here.unsqueeze(-1))
        return x.to(ctx.dtype), None, None, None, None


def vocab_parallel_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, weight: ParameterSpec, group: Group
) -> torch.Tensor:
    """-log softmax(logits)[label] for every token: logits [..., v/t], labels [...] -> losses [...].

    Computed in fp32 for half precisions, in the logits' own dtype otherwise; the logits may be overwritten. `weight` is
    the spec of the output weight: its box says which entries these logits are for; padding counts for nothing.
    """
    return _VocabParallelCrossEntropy.apply(logits, labels, weight.box.offset[0], weight.box.shape[0], group)


@torch.no_grad()
def vocab_parallel_argmax(logits: torch.Tensor, weight: ParameterSpec, group: Group) -> torch.Tensor:
    """The entry with the largest logit, the first of several: logits [..., v/t] -> int64 [...]. `weight` as above."""
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
