"""What all layers of a stage have in common."""

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
            # The only way to correct a field of a frozen dataclass.
            object.__setattr__(self, "sequence_parallel", False)

    @property
    def tensor(self) -> Group:
        """The tensor-parallel ranks."""
        return self.context.tensor

    @property
    def bias(self) -> bool:
        """Whether linear layers have biases."""
        return not self.model.disable_bias_linear

    def parameter(
        self,
        shape: tuple[int, ...],
        init: str,
        std: float = 0.0,
        *,
        box: Box | None = None,
        rows: int | None = None,
        tied: bool = False,
        on_part: bool = False,
        on_heads: bool = False,
    ) -> torch.nn.Parameter:
        """A parameter of this global shape. Those that start normal get weight decay.

        Args:
            shape: in the whole model.
            init: "normal", "zeros" or "ones".
            std: standard deviation for "normal".
            box: what this rank holds of it; None: every tensor-parallel rank holds the whole.
            rows: first dim in memory, where padding makes it larger than the box's.
            tied: whether first and last stage both hold it.
            on_part: whether it is applied to this rank's part of the sequence only, under sequence
                parallelism: its gradients are then summed over the tensor-parallel ranks.
            on_heads: whether it is applied to this rank's attention heads only: its gradients are
                summed over the tensor-parallel ranks, always.
        """
        # Stages hold different layers, so along the pipeline only tied weights have copies.
        axes = ["pipeline"] if box is None else ["tensor", "pipeline"]
        if tied:
            axes.remove("pipeline")
        box = box or Box.whole(shape)
        spec = ParameterSpec(
            global_shape=shape,
            box=box,
            sharded=tuple(axes),
            partial=("tensor",) if on_heads or (on_part and self.sequence_parallel) else (),
            init=init,
            std=std,
            weight_decay=init == "normal",
        )
        local_shape = box.shape if rows is None else (rows, *box.shape[1:])
        return make_parameter(local_shape, spec, self.dtype, self.context.device)
