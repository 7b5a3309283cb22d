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
        of_heads: whether it normalises attention heads: weight and bias are [d], and its input is
            this rank's heads.
    """

    def __init__(self, settings: LayerSettings, on_part: bool = True, of_heads: bool = False):
        super().__init__()
        model = settings.model
        shape = (model.head_size if of_heads else model.hidden_size,)
        places = {"on_heads": True} if of_heads else {"on_part": on_part}
        self.epsilon = model.norm_epsilon
        self.backend = model.norm_backend
        self.weight = settings.parameter(shape, "ones", **places)
        self.bias = None
        if model.normalization == "LayerNorm":
            self.bias = settings.parameter(shape, "zeros", **places)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[s, b, h] -> [s, b, h], both [s/t, b, h] under sequence parallelism; of heads [s, b, n/t,
        d] -> [s, b, n/t, d]."""
        if self.backend == "apex" and x.is_cuda:
            return apex_norm(x, self.weight, self.bias, self.epsilon)
        if self.bias is None and self.backend == "auto":
            return rms_norm(x, self.weight, self.epsilon)[0]
        weight = self.weight
        bias = self.bias
        wide = x
        if x.dtype in HALF_PRECISIONS and not x.is_cuda:
            # torch's CPU kernel sums the gradients of weight and bias over the tokens in half
            # precision, and so loses most of them.
            weight = weight.float()
            bias = None if bias is None else bias.float()
            wide = x.float()
        if bias is None:
            y = nn.functional.rms_norm(wide, weight.shape, weight, self.epsilon)
        else:
            y = nn.functional.layer_norm(wide, weight.shape, weight, bias, self.epsilon)
        return y.to(x.dtype)


def apex_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, epsilon: float
) -> torch.Tensor:
    """LayerNorm of x [..., h] with weight and bias [h], or RMSNorm without a bias, by the functions
    that NVIDIA apex's FusedLayerNorm and FusedRMSNorm call. Imports apex."""
    from apex.normalization.fused_layer_norm import fused_layer_norm_affine, fused_rms_norm_affine

    if bias is None:
        return fused_rms_norm_affine(x, weight, weight.shape, epsilon)
    return fused_layer_norm_affine(x, weight, bias, weight.shape, epsilon)
