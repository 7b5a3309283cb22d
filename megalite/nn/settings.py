"""What all layers of a stage have in common."""

import math
from dataclasses import dataclass, field

import torch

from megalite.nn.config import ModelConfig, RecomputeConfig
from megalite.nn.parameter import ParameterSpec, make_parameter
from megalite.parallel.boxes import Box
from megalite.parallel.collectives import Group
from megalite.parallel.context import ParallelContext
from megalite.parallel.rng import Rng


@dataclass(frozen=True)
class LayerSettings:
    """The model's shape, this rank's groups and random numbers, and the numerical type: made once
    for a model."""

    model: ModelConfig
    context: ParallelContext
    rng: Rng
    dtype: torch.dtype = torch.float32
    """Of the parameters and of the hidden states."""
    sequence_parallel: bool = False
    """Whether norms, dropout and residuals work on this rank's s/t part of the sequence
    (Korthikanti et al. 2022). Becomes False with one tensor-parallel rank, where there is nothing
    to divide."""
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)

    def __post_init__(self):
        if self.tensor.size == 1:
            object.__setattr__(self, "sequence_parallel", False)

    @property
    def tensor(self) -> Group:
        """The tensor-parallel ranks."""
        return self.context.tensor

    @property
    def bias(self) -> bool:
        """Whether linear layers have biases."""
        return not self.model.disable_bias_linear

    @property
    def output_std(self) -> float:
        """Standard deviation of the weights that write to the residual stream: `std / sqrt(2 L)`
        (Radford et al. 2019)."""
        return self.model.init_method_std / math.sqrt(2 * self.model.num_layers)

    def local_sequence(self, length: int) -> int:
        """Tokens of a sequence that this rank's norms, dropout and residuals see: s, or s/t."""
        return length // self.tensor.size if self.sequence_parallel else length

    def replicated(
        self, shape: tuple[int, ...], init: str, std: float = 0.0, on_part: bool = False
    ) -> torch.nn.Parameter:
        """A parameter that every tensor-parallel rank holds whole. Vectors get no weight decay.

        on_part: whether it is applied to this rank's part of the sequence only, under sequence
        parallelism: its gradients are then summed over the tensor-parallel ranks.
        """
        spec = ParameterSpec(
            global_shape=shape,
            box=Box.whole(shape),
            partial=("tensor",) if on_part and self.sequence_parallel else (),
            init=init,
            std=std,
            weight_decay=len(shape) > 1,
        )
        return make_parameter(shape, spec, self.dtype, self.context.device)

    def sharded(
        self,
        global_shape: tuple[int, ...],
        box: Box,
        init: str,
        *,
        std: float = 0.0,
        local_shape: tuple[int, ...] | None = None,
        weight_decay: bool = True,
        tied: bool = False,
    ) -> torch.nn.Parameter:
        """A parameter of which every tensor-parallel rank holds another box.

        local_shape: shape in memory, where padding makes it larger than the box. tied: whether
        first and last stage both hold it.
        """
        spec = ParameterSpec(
            global_shape=global_shape,
            box=box,
            sharded=("tensor",) if tied else ("tensor", "pipeline"),
            init=init,
            std=std,
            weight_decay=weight_decay,
        )
        return make_parameter(local_shape or box.shape, spec, self.dtype, self.context.device)
