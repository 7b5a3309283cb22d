"""Parameters that know which box of which global tensor they are."""

from dataclasses import dataclass, replace

import torch

from megalite.parallel.boxes import Box


@dataclass(frozen=True)
class ParameterSpec:
    """What a parameter is in the whole model. `parameter.spec` on every parameter of a megalite module.

    The tensor may be larger than the box (rows of vocabulary padding at the end); `real` gives the part that counts.
    """

    global_shape: tuple[int, ...]
    """Shape in the whole model, the same in every layout."""
    box: Box
    """The part that this rank holds."""
    tensor_sharded: bool
    """False: every tensor-parallel rank holds the same values."""
    init: str
    """"normal", "zeros" or "ones"."""
    std: float = 0.0
    """Standard deviation for "normal"."""
    weight_decay: bool = True
    """False for biases and norms."""
    sequence_partial: bool = False
    """Under sequence parallelism each rank's gradient covers its part of the sequence: summed over tensor ranks."""
    tied_copy: bool = False
    """The last stage's copy of the word embedding: trained, but neither counted in the norm nor stored."""
    name: str = ""
    """Global name, `layers.17.attention.qkv.weight`: set by `name_parameters`."""

    def real(self, tensor: torch.Tensor) -> torch.Tensor:
        """The view of a tensor of the parameter's local shape that holds the box, padding left out."""
        return tensor[tuple(slice(0, n) for n in self.box.shape)]


def make_parameter(
    local_shape, spec: ParameterSpec, dtype: torch.dtype, device: torch.device
) -> torch.nn.Parameter:
    """A zero-filled parameter with its spec attached; `init.initialize` fills it once it has its name."""
    parameter = torch.nn.Parameter(torch.zeros(local_shape, dtype=dtype, device=device))
    parameter.spec = spec
    return parameter


def name_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Write each parameter's global name into its spec and return parameters by name.

    Module paths are global names already: layers are kept under their number in the whole model.
    """
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        parameter.spec = replace(parameter.spec, name=name)
    return parameters
