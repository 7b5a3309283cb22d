"""Parameters that know which box of which global tensor they are, and who else holds it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from operator import add

import torch

from megalite.parallel.boxes import Box, boxes_of_range

HALF_PRECISIONS = (torch.bfloat16, torch.float16)
"""Of which the optimizer keeps fp32 master copies."""


@dataclass(frozen=True, kw_only=True)
class ParameterSpec:
    """What a parameter is in the whole model: `parameter.spec` on every parameter of a megalite
    module.

    The tensor may be larger than the box (rows of vocabulary padding at the end); `real` gives the
    part that counts.
    """

    global_shape: tuple[int, ...]
    """Shape in the whole model, the same in every layout."""
    box: Box
    """The part that this rank holds."""
    sharded: tuple[str, ...] = ("pipeline",)
    """Axes along which ranks hold different values. Along every other axis they hold the same: data
    replicas always, tensor-parallel ranks of a norm, and first and last stage of a tied embedding,
    which is not sharded over "pipeline"."""
    partial: tuple[str, ...] = ()
    """Axes, beside the data axis, over which gradients must be summed, since each rank sees a part
    of the sequence, or of the attention heads."""
    init: str
    """"normal", "zeros" or "ones"."""
    std: float = 0.0
    """Standard deviation for "normal"."""
    weight_decay: bool = True
    """False for biases and norms."""
    local_shape: tuple[int, ...] = ()
    """Shape of the tensor on this rank, padding included: set by `make_parameter`."""
    name: str = ""
    """Global name, `layers.17.attention.qkv.weight`: set by `name_parameters`."""

    def real(self, tensor: torch.Tensor) -> torch.Tensor:
        """The view of a tensor of the parameter's local shape that holds the box, padding left
        out."""
        return tensor[tuple(slice(0, n) for n in self.box.shape)]

    def is_primary(self, coordinates: Mapping[str, int]) -> bool:
        """Whether the rank at these coordinates is the primary owner: of all that hold the same
        values, the one that counts them in a norm and a number of parameters, and writes them to a
        checkpoint.

        It is the first along every axis that the parameter is not sharded over. An axis that is
        left out of `coordinates` is not looked at.
        """
        return all(index == 0 for axis, index in coordinates.items() if axis not in self.sharded)


def held_boxes(
    parameter: torch.nn.Parameter, tensor: torch.Tensor, elements: tuple[int, int] | None = None
) -> list[tuple[Box, torch.Tensor]]:
    """(box of the global tensor, view of `tensor` with its values) for what `tensor` holds.

    tensor: of the parameter's local shape; with `elements` (start, stop), its flattened elements
    `start` to `stop`, any contiguous tensor of that many. Vocabulary padding is left out.
    """
    spec = parameter.spec
    real = Box.whole(spec.box.shape)
    flat = tensor.view(-1)
    held = []
    first = 0
    shape = spec.local_shape
    for local in boxes_of_range(shape, *(elements or (0, math.prod(shape)))):
        values = flat[first : first + local.numel].view(local.shape)
        first += local.numel
        box = local.intersect(real)
        if box is not None:
            offset = tuple(map(add, box.offset, spec.box.offset))
            held.append((Box(offset, box.shape), values[box.slices_in(local)]))
    return held


def make_parameter(
    local_shape: tuple[int, ...], spec: ParameterSpec, dtype: torch.dtype, device: torch.device
) -> torch.nn.Parameter:
    """A zero-filled parameter with its spec attached; `init.initialize` fills it once it has its
    name."""
    parameter = torch.nn.Parameter(torch.zeros(local_shape, dtype=dtype, device=device))
    parameter.spec = replace(spec, local_shape=tuple(local_shape))
    return parameter


def name_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Write each parameter's global name into its spec and return the parameters by name.

    Module paths are global names already: layers are kept under their number in the whole model.
    """
    # A spec is frozen, since many read it: naming makes a new one.
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        parameter.spec = replace(parameter.spec, name=name)
    return parameters
