"""Normalisation layers: LayerNorm (Ba et al. 2016) and RMSNorm (Zhang and Sennrich 2019)."""

import torch
from torch import nn

from megalite.kernels.norm import rms_norm
from megalite.nn.parameter import HALF_PRECISIONS
from megalite.nn.settings import LayerSettings


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last dim, with weight [h] and, for LayerNorm, bias [h].

    Every tensor-parallel rank holds the whole weight and bias.

    Args:
        settings: settings that all layers share.
        on_part: whether its input is this rank's shard of the sequence under sequence parallelism.
    """

    def __init__(self, settings: LayerSettings, on_part: bool = True):
        super().__init__()
        shape = (settings.model.hidden_size,)
        self.epsilon = settings.model.norm_epsilon
        self.weight = settings.parameter(shape, "ones", on_part=on_part)
        self.bias = None
        if settings.model.normalization == "LayerNorm":
            self.bias = settings.parameter(shape, "zeros", on_part=on_part)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[s, b, h] -> [s, b, h], both [s/t, b, h] under sequence parallelism."""
        if self.bias is None:
            return rms_norm(x, self.weight, self.epsilon)[0]
        weight = self.weight
        bias = self.bias
        wide = x
        if x.dtype in HALF_PRECISIONS and not x.is_cuda:
            # torch's CPU kernel sums the gradients of weight and bias over the tokens in half
            # precision, and so loses most of them.
            weight = weight.float()
            bias = bias.float()
            wide = x.float()
        return nn.functional.layer_norm(wide, weight.shape, weight, bias, self.epsilon).to(x.dtype)
