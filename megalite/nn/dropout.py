"""Dropout at its places in a block, under either scheme of random numbers."""

import torch
from torch import nn

from megalite.kernels.dropout import bias_dropout_add, place
from megalite.kernels.softmax import Dropout
from megalite.parallel.context import ParallelContext
from megalite.parallel.rng import REPLICATED, TENSOR, Rng, RngTracker, dropout

ATTENTION_WEIGHTS, AFTER_ATTENTION, AFTER_MLP, EMBEDDING = range(4)
"""Sites within a layer (the embedding counts as layer 0): part of the format of kernels.dropout."""


def _needed(samples: torch.Tensor | None) -> torch.Tensor:
    if samples is None:
        raise ValueError(
            "dropout that no layout changes depends on the samples: give the model the rows' numbers, samples=[b], "
            "or use RngTracker's streams, evaluation mode, or a dropout of 0"
        )
    return samples


class HiddenDropout(nn.Module):
    """residual + dropout(x + bias) on hidden states [s, b, h], or on this rank's part [s/t, b, h] of the sequence."""

    def __init__(
        self,
        p: float,
        rng: Rng,
        layer: int,
        site: int,
        context: ParallelContext,
        sequence_parallel: bool,
    ):
        super().__init__()
        self.p, self.rng, self.place = p, rng, place(layer, site)
        self.part = context.tensor.rank if sequence_parallel and context.tensor.size > 1 else 0
        # Streams: tensor ranks that hold the same values must draw the same numbers, others each their own.
        self.stream = TENSOR if sequence_parallel and context.tensor.size > 1 else REPLICATED

    def forward(
        self,
        x: torch.Tensor,
        samples: torch.Tensor | None,
        bias: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`samples` [b]: global numbers of the rows, for the layout-independent scheme. No dropout in evaluation."""
        if self.training and self.p > 0 and not isinstance(self.rng, RngTracker):
            samples = _needed(samples)
            length = x.shape[0]
            rows = torch.arange(
                self.part * length, (self.part + 1) * length, device=x.device
            ).unsqueeze(1)
            return bias_dropout_add(
                x, bias, residual, rows, samples, self.place, *self.rng.key, self.p
            )
        x = x if bias is None else x + bias
        if self.training and self.p > 0:
            x = dropout(x, self.p, self.rng[self.stream])
        return x if residual is None else residual + x


class AttentionDropout(nn.Module):
    """Dropout of attention weights [b, n/t, s, s]: row (head, query), column key."""

    def __init__(self, p: float, rng: Rng, layer: int, context: ParallelContext):
        super().__init__()
        self.p, self.rng, self.place = p, rng, place(layer, ATTENTION_WEIGHTS)
        self.part = context.tensor.rank

    def forward(self, weights: torch.Tensor, samples: torch.Tensor | None) -> torch.Tensor:
        """`samples` [b]: global numbers of the rows of the microbatch."""
        if isinstance(self.rng, RngTracker):
            return dropout(weights, self.p, self.rng[TENSOR])
        rows, samples, place, key, p = self.counted(*weights.shape[1:3], samples)
        return bias_dropout_add(weights, None, None, rows, samples, place, *key, p)

    def counted(self, heads: int, queries: int, samples: torch.Tensor | None) -> Dropout:
        """The same dropout for a fused softmax of scores [b, heads, queries, keys], under the scheme of counters."""
        samples = _needed(samples)
        first = self.part * heads * queries
        rows = torch.arange(first, first + heads * queries, device=samples.device).view(
            heads, queries
        )
        return Dropout(rows, samples[:, None, None], self.place, self.rng.key, self.p)
