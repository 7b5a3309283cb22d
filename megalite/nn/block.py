"""One transformer layer.

Pre-norm: x + attention(norm(x)), then x + mlp(norm(x)). Post-norm (Vaswani et al. 2017, section
3.1): norm(x + attention(x)), then norm(x + mlp(x)).
"""

from torch import Tensor, nn

from megalite.nn.attention import Attention
from megalite.nn.dropout import AFTER_ATTENTION, AFTER_MLP, HiddenDropout
from megalite.nn.mlp import MLP
from megalite.nn.norm import Norm
from megalite.nn.rope import RotaryTable
from megalite.nn.settings import LayerSettings


class Block(nn.Module):
    """A transformer layer: hidden states [s, b, h] ([s/t, b, h] with sequence parallelism).

    Args:
        settings: what all layers share.
        layer: its number in the whole model.
        causal: whether a token sees only those before it and itself.
    """

    def __init__(self, settings: LayerSettings, layer: int, causal: bool):
        super().__init__()
        self.post_norm = settings.model.post_norm
        self.attention_norm = Norm(settings)
        self.attention = Attention(settings, layer, causal)
        self.attention_residual = HiddenDropout(settings, layer, AFTER_ATTENTION)
        self.mlp_norm = Norm(settings)
        self.mlp = MLP(settings)
        self.mlp_residual = HiddenDropout(settings, layer, AFTER_MLP)

    def forward(
        self, x: Tensor, rotary: RotaryTable | None, mask: Tensor | None, samples: Tensor | None
    ) -> Tensor:
        """[s, b, h] -> [s, b, h], both [s/t, b, h] under sequence parallelism.

        `rotary` and `mask` are for the attention; `samples` [b] are the rows' global sample
        numbers, for counter-based dropout.
        """
        y = self.attention(x if self.post_norm else self.attention_norm(x), rotary, mask, samples)
        # The bias of the output projection, dropout and the residual sum are one pass over memory.
        x = self.attention_residual(y, samples, self.attention.output.bias, x)
        x = self.attention_norm(x) if self.post_norm else x
        y = self.mlp(x if self.post_norm else self.mlp_norm(x))
        x = self.mlp_residual(y, samples, self.mlp.down.bias, x)
        return self.mlp_norm(x) if self.post_norm else x
