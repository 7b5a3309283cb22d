"""The MLP of a block: GELU (Hendrycks and Gimpel 2016) or SwiGLU (Shazeer 2020)."""

from torch import Tensor, nn

from megalite.kernels.activation import bias_gelu, swiglu
from megalite.nn.linear import ColumnParallelLinear, RowParallelLinear
from megalite.nn.settings import LayerSettings


def gelu(x: Tensor, form: str) -> Tensor:
    """x Phi(x), exactly ("erf") or by its "tanh" approximation."""
    return nn.functional.gelu(x) if form == "erf" else bias_gelu(x, None)


class MLP(nn.Module):
    """down(gelu(up(x))), or down(silu(gate) * up) with gate and up as one weight [2, f, h]; f split
    over ranks."""

    def __init__(self, settings: LayerSettings):
        super().__init__()
        model = settings.model
        self.swiglu = model.swiglu
        self.gelu = model.gelu
        if model.swiglu:
            # Split along f, so that a rank has gate and up of the same features.
            self.up = ColumnParallelLinear(settings, model.hidden_size, (2, model.ffn), axis=1)
        else:
            self.up = ColumnParallelLinear(settings, model.hidden_size, (model.ffn,))
        self.down = RowParallelLinear(settings, model.ffn, model.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[s, b, h] -> [s, b, h], both [s/t, b, h] under sequence parallelism. The bias of the
        down projection is not added."""
        x = self.up(x)
        if self.swiglu:
            return self.down(swiglu(x))
        return self.down(gelu(x, self.gelu))
