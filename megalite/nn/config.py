"""What is kept for the backward pass and what is computed again. Imports no torch."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class RecomputeConfig:
    """Activation checkpointing: memory against time. Gradients are the same to the bit."""

    recompute_granularity: Literal["none", "selective", "full"] = "none"
    """none: keep all; selective: recompute the attention core (scores, softmax, dropout, values); full: whole layers."""
    recompute_activations: bool = False
    """Short for --recompute-granularity selective."""
    recompute_method: Literal["uniform", "block"] = "uniform"
    """With full: uniform keeps the input of every group of n layers; block recomputes only the first n layers of a stage."""
    recompute_num_layers: int = 1
    """With full: n of --recompute-method."""

    @property
    def granularity(self) -> str:
        """The granularity, with the short form taken into account."""
        return "selective" if self.recompute_activations else self.recompute_granularity
