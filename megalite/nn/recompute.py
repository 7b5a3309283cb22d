"""Activation checkpointing; random streams, where there are any, are replayed."""

from collections.abc import Callable
from contextlib import nullcontext

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megalite.parallel.rng import Rng


def recompute(function: Callable[..., Tensor], rng: Rng, *tensors: Tensor) -> Tensor:
    """`function(*tensors)`, keeping the inputs only: what its backward needs is computed again
    then, with the same random numbers, so that gradients are the same to the bit (Chen et al.
    2016)."""

    def contexts():
        # One for the forward, one for the computation in the backward. Called before the forward,
        # so the states are those that its random numbers were drawn from.
        return nullcontext(), rng.replay(rng.states())

    return checkpoint(
        function, *tensors, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
    )
