"""Activation checkpointing; random streams, where there are any, are replayed."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch.utils.checkpoint import checkpoint

from megalite.parallel.rng import Rng


def recompute(
    function: Callable[..., torch.Tensor], rng: Rng, *tensors: torch.Tensor
) -> torch.Tensor:
    """`function(*tensors)`, keeping the inputs only: what its backward needs is computed again
    then, with the same random numbers, so that gradients are the same to the bit (Chen et al.
    2016)."""

    def contexts():
        return nullcontext(), rng.replay(rng.states())

    return checkpoint(
        function, *tensors, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
    )
