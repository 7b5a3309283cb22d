"""Normalisation layers: LayerNorm (Ba et al. 2016) and RMSNorm (Zhang and Sennrich 2019)."""

import torch
from torch import nn

from megalite.kernels.norm import rms_norm
from megalite.nn.config import ModelConfig
from megalite.nn.parameter import ParameterSpec, make_parameter
from megalite.parallel.boxes import Box
from megalite.parallel.context import ParallelContext


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last dim, with weight [h] and, for LayerNorm, bias [h].

    Every tensor-parallel rank holds all of it; under sequence parallelism each sees its part of the sequence only.
    """

    def __init__(
        self, model: ModelConfig, context: ParallelContext, dtype, sequence_parallel: bool
    ):
        super().__init__()
        self.epsilon = model.norm_epsilon
        shape = (model.hidden_size,)

        def parameter(init):
            partial = sequence_parallel and context.tensor.size > 1
            spec = ParameterSpec(
                shape, Box.whole(shape), False, init, weight_decay=False, sequence_partial=partial
            )
            return make_parameter(shape, spec, dtype, context.device)

        self.weight = parameter("ones")
        self.bias = parameter("zeros") if model.normalization == "LayerNorm" else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[s, b, h] -> [s, b, h]."""
        if self.bias is None:
            return rms_norm(x, self.weight, self.epsilon)[0]
        if x.dtype == torch.bfloat16 and not x.is_cuda:
            # torch's CPU kernel sums the gradients of weight and bias over the tokens in bf16, and loses most of them.
            weight, bias = self.weight.float(), self.bias.float()
            return nn.functional.layer_norm(x.float(), weight.shape, weight, bias, self.epsilon).to(
                x.dtype
            )
        return nn.functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.epsilon)
