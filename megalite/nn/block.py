"""One transformer layer, pre-norm: x + attention(norm(x)), then x + mlp(norm(x))."""

import torch
from torch import nn

from megalite.nn.attention import Attention
from megalite.nn.config import ModelConfig, RecomputeConfig
from megalite.nn.mlp import MLP
from megalite.nn.norm import Norm
from megalite.parallel.context import ParallelContext
from megalite.parallel.rng import REPLICATED, TENSOR, RngTracker, dropout


class HiddenDropout(nn.Module):
    """Dropout of the residual stream: [s, b, h], the same on all tensor-parallel ranks unless the sequence is split."""

    def __init__(self, p: float, rng: RngTracker, context: ParallelContext, sequence_parallel: bool):
        super().__init__()
        self.p, self.rng = p, rng
        self.stream = TENSOR if sequence_parallel and context.tensor.size > 1 else REPLICATED

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Drop and rescale in training; the identity in evaluation and with p = 0."""
        return dropout(x, self.p, self.rng[self.stream]) if self.training and self.p > 0 else x


class Block(nn.Module):
    """A transformer layer of GPT or Llama shape: hidden states [s, b, h] ([s/t, b, h] with sequence parallelism)."""

    def __init__(
        self, model: ModelConfig, recompute_config: RecomputeConfig, context: ParallelContext, rng: RngTracker, dtype,
        sequence_parallel: bool,
    ):  # fmt: skip
        super().__init__()
        self.attention_norm = Norm(model, context, dtype, sequence_parallel)
        self.attention = Attention(model, recompute_config, context, rng, dtype, sequence_parallel)
        self.mlp_norm = Norm(model, context, dtype, sequence_parallel)
        self.mlp = MLP(model, context, dtype, sequence_parallel)
        self.dropout = HiddenDropout(model.hidden_dropout, rng, context, sequence_parallel)

    def forward(self, x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
        """One layer. `rotary` is the table of `nn.rope`, or None."""
        x = self._add(x, self.attention(self.attention_norm(x), rotary), self.attention.output.bias)
        return self._add(x, self.mlp(self.mlp_norm(x)), self.mlp.down.bias)

    def _add(self, residual: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """residual + dropout(x + bias)."""
        return residual + self.dropout(x if bias is None else x + bias)
