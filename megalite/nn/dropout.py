"""Dropout at its sites in a block, with counter-based random numbers or per-rank streams."""

import torch
from torch import Tensor, nn

from megalite.kernels.dropout import Dropout, bias_dropout_add, site_id
from megalite.nn.settings import LayerSettings
from megalite.parallel.rng import REPLICATED, TENSOR, RngTracker, dropout

ATTENTION_WEIGHTS, AFTER_ATTENTION, AFTER_MLP, EMBEDDING = range(4)
"""Sites within a layer (the embedding counts as layer 0): part of the format of kernels.dropout."""


def _required(samples: Tensor | None) -> Tensor:
    if samples is None:
        raise ValueError(
            "counter-based dropout depends on the samples: give the model the rows' numbers, "
            "samples=[b], or use RngTracker's streams, evaluation mode, or a dropout of 0"
        )
    return samples


class HiddenDropout(nn.Module):
    """residual + dropout(x + bias) on hidden states [s, b, h], or [s/t, b, h] under sequence
    parallelism.

    Args:
        settings: what all layers share.
        layer: number of the layer in the whole model.
        site: AFTER_ATTENTION, AFTER_MLP or EMBEDDING.
        p: probability of dropping an element; None: the model's --hidden-dropout.
    """

    def __init__(self, settings: LayerSettings, layer: int, site: int, p: float | None = None):
        super().__init__()
        self.p = settings.model.hidden_dropout if p is None else p
        self.rng = settings.rng
        self.site_id = site_id(layer, site)
        self.shard_index = settings.tensor.rank if settings.sequence_parallel else 0
        # Of per-rank streams: tensor ranks that hold the same values must draw the same numbers,
        # ranks with different values different ones.
        self.stream = TENSOR if settings.sequence_parallel else REPLICATED

    def forward(
        self,
        x: Tensor,
        samples: Tensor | None,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """`samples` [b]: global numbers of the rows, which counter-based dropout needs. Nothing is
        dropped in evaluation mode."""
        drops = self.training and self.p > 0
        if drops and not isinstance(self.rng, RngTracker):
            samples = _required(samples)
            first = self.shard_index * x.shape[0]
            rows = torch.arange(first, first + x.shape[0], device=x.device).unsqueeze(1)
            site = (self.site_id, *self.rng.key)
            return bias_dropout_add(x, bias, residual, rows, samples, *site, self.p)
        if bias is not None:
            x = x + bias
        if drops:
            x = dropout(x, self.p, self.rng[self.stream])
        return x if residual is None else residual + x


class AttentionDropout(nn.Module):
    """Dropout of attention weights [b, n/t, s, s]: row (head, query), column key.

    Args:
        settings: what all layers share.
        layer: number of the layer in the whole model.
    """

    def __init__(self, settings: LayerSettings, layer: int):
        super().__init__()
        self.p = settings.model.attention_dropout
        self.rng = settings.rng
        self.site_id = site_id(layer, ATTENTION_WEIGHTS)
        self.shard_index = settings.tensor.rank

    def forward(self, weights: Tensor, samples: Tensor | None) -> Tensor:
        """`samples` [b]: global numbers of the rows of the microbatch."""
        if isinstance(self.rng, RngTracker):
            return dropout(weights, self.p, self.rng[TENSOR])
        rows, samples, site_id, key, p = self.counter_based(*weights.shape[1:3], samples)
        return bias_dropout_add(weights, None, None, rows, samples, site_id, *key, p)

    def counter_based(self, heads: int, queries: int, samples: Tensor | None) -> Dropout:
        """Counter-based dropout of this site, for a fused softmax of scores [b, heads, queries,
        keys]. `samples` [b]: global numbers of the rows."""
        samples = _required(samples)
        first = self.shard_index * heads * queries
        # Heads are numbered in the whole model: this rank's follow those of the ranks before it.
        rows = torch.arange(first, first + heads * queries, device=samples.device)
        rows = rows.view(heads, queries)
        return Dropout(rows, samples[:, None, None], self.site_id, self.rng.key, self.p)
