"""The MLP of a block: GELU (Hendrycks and Gimpel 2016) or SwiGLU (Shazeer 2020)."""

import math

import torch
from torch import nn

from megalite.kernels.activation import bias_gelu, swiglu
from megalite.nn.config import ModelConfig
from megalite.nn.linear import ColumnParallelLinear, RowParallelLinear
from megalite.parallel.context import ParallelContext


def gelu(x: torch.Tensor, form: str) -> torch.Tensor:
    """x Phi(x), exactly ("erf") or by its "tanh" approximation."""
    return nn.functional.gelu(x) if form == "erf" else bias_gelu(x, None)


class MLP(nn.Module):
    """down(gelu(up(x))), or down(silu(gate) * up) with gate and up as one weight [2, f, h]; f split over ranks."""

    def __init__(
        self, model: ModelConfig, context: ParallelContext, dtype, sequence_parallel: bool
    ):
        super().__init__()
        self.swiglu, self.gelu = model.swiglu, model.gelu
        features, split_dim = ((2, model.ffn), 1) if model.swiglu else ((model.ffn,), 0)
        std, bias = model.init_method_std, not model.disable_bias_linear
        self.up = ColumnParallelLinear(
            model.hidden_size, features, split_dim, std, bias, context, dtype, sequence_parallel
        )
        self.down = RowParallelLinear(
            model.ffn,
            model.hidden_size,
            std / math.sqrt(2 * model.num_layers),
            bias,
            context,
            dtype,
            sequence_parallel,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[s, b, h] -> [s, b, h], without the bias of the down projection."""
        x = self.up(x)
        if self.swiglu:
            return self.down(swiglu(x))
        return self.down(gelu(x, self.gelu))
