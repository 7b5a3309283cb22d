"""Random numbers of a rank's dropout.

Either counter-based (--rng-scheme global; Salmon et al. 2011), the same in every layout, or drawn
from per-rank streams as in Megatron-LM (--rng-scheme megatron).
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch

from megalite.kernels.philox import key_of
from megalite.parallel.context import ParallelContext

REPLICATED = "replicated"
"""Stream for values that all tensor-parallel ranks hold: they draw the same numbers."""
TENSOR = "tensor"
"""Stream for values that are split over tensor-parallel ranks: each draws its own numbers."""


class RngTracker:
    """The per-rank streams: torch generators on the rank's device, by name.

    torch's default generator is not used, so that other code in the process cannot change a run.
    """

    def __init__(self, seeds: dict[str, int], device: torch.device | str = "cpu"):
        self._generators: dict[str, torch.Generator] = {}
        for name, seed in seeds.items():
            self._generators[name] = torch.Generator(device).manual_seed(seed)

    @classmethod
    def for_rank(cls, seed: int, context: ParallelContext) -> "RngTracker":
        """Streams of one rank, seeded by Megatron-LM's rule.

        The rule: `seed + 100 pp` for REPLICATED, `seed + 2718 + 100 pp + tp` for TENSOR. In
        Megatron-LM all data-parallel replicas have the same seeds, and so drop the same elements of
        different samples. Here replica d adds d times a large prime; replica 0 keeps the rule.
        """
        position = context.coordinates
        base = seed + 100 * position["pipeline"] + 1_000_003 * position["data"]
        return cls({REPLICATED: base, TENSOR: base + 2718 + position["tensor"]}, context.device)

    def __getitem__(self, name: str) -> torch.Generator:
        return self._generators[name]

    def states(self) -> dict[str, torch.Tensor]:
        """A copy of each stream's state by name: uint8 tensors on the CPU."""
        return {name: generator.get_state() for name, generator in self._generators.items()}

    def restore(self, states: dict[str, torch.Tensor]) -> None:
        """Set each stream to its state from `states()`. Raises KeyError if one is missing."""
        for name, generator in self._generators.items():
            generator.set_state(states[name])

    @contextmanager
    def replay(self, states: dict[str, torch.Tensor]) -> Iterator[None]:
        """Run a block with the streams at earlier states, then restore the present ones.

        For recomputation in the backward.
        """
        now = self.states()
        self.restore(states)
        try:
            yield
        finally:
            self.restore(now)


def dropout(x: torch.Tensor, p: float, generator: torch.Generator) -> torch.Tensor:
    """Zero each element with probability p and scale the others by 1 / (1 - p).

    Draws from `generator`, which torch's own dropout cannot.
    """
    # The scale is not part of the mask: rounded to bf16, 1 / 0.9 would be 0.16% too small.
    keep = torch.empty_like(x).bernoulli_(1 - p, generator=generator)
    return x * keep * (1 / (1 - p))


@dataclass(frozen=True)
class CounterBasedRng:
    """Counter-based random numbers (Salmon et al. 2011), without streams or state.

    A number depends only on the key and on the global index of the element it is used for, so every
    layout draws the same.
    """

    key: tuple[int, int]
    """Philox key of the dropout masks of a run."""

    @classmethod
    def for_seed(cls, seed: int) -> "CounterBasedRng":
        """The random numbers of a run, the same on every rank."""
        return cls(key_of(seed, "dropout"))

    def states(self) -> dict[str, torch.Tensor]:
        """Empty: there is no state."""
        return {}

    def restore(self, states: dict[str, torch.Tensor]) -> None:
        """Does nothing: there is no state."""

    def replay(self, states: dict[str, torch.Tensor]) -> AbstractContextManager[None]:
        """An empty context: counter-based numbers are the same every time."""
        return nullcontext()


Rng = RngTracker | CounterBasedRng
"""Where dropout's random numbers come from."""
