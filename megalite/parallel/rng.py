"""Random numbers of a rank: counted ones that no layout can change, or named streams in
Megatron-LM's manner."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch

from megalite.kernels.philox import key_of
from megalite.parallel.context import ParallelContext

REPLICATED = "replicated"
"""Stream for values that all tensor-parallel ranks hold alike: they must draw the same numbers."""
TENSOR = "tensor"
"""Stream for values that are split over tensor-parallel ranks: each must draw its own."""


class RngTracker:
    """Named random streams of one rank, as torch generators on its device.

    torch's own default generator is left alone, so that other code in the process cannot disturb a
    run.
    """

    def __init__(self, seeds: dict[str, int], device: torch.device | str = "cpu"):
        self._generators = {
            name: torch.Generator(device).manual_seed(seed) for name, seed in seeds.items()
        }

    @classmethod
    def for_rank(cls, seed: int, context: ParallelContext) -> "RngTracker":
        """Streams seeded by Megatron-LM's rule: `seed + 100 pp` for REPLICATED, `seed + 2718 + 100
        pp + tp` for TENSOR.

        Its data-parallel replicas share both, and so drop the same elements of different samples;
        here replica 0 keeps the rule and the others add a large prime each.
        """
        position = context.coordinates
        base = seed + 100 * position["pipeline"] + 1_000_003 * position["data"]
        return cls({REPLICATED: base, TENSOR: base + 2718 + position["tensor"]}, context.device)

    def __getitem__(self, name: str) -> torch.Generator:
        return self._generators[name]

    def states(self) -> dict[str, torch.Tensor]:
        """A copy of every stream's state: uint8 tensors on the CPU."""
        return {name: generator.get_state() for name, generator in self._generators.items()}

    def restore(self, states: dict[str, torch.Tensor]) -> None:
        """Put every stream at a state from `states()`. Raises KeyError for a stream that is
        missing."""
        for name, generator in self._generators.items():
            generator.set_state(states[name])

    @contextmanager
    def replay(self, states: dict[str, torch.Tensor]) -> Iterator[None]:
        """Run a block with the streams at earlier states, then go on from where they are now (for
        recomputation)."""
        now = self.states()
        self.restore(states)
        try:
            yield
        finally:
            self.restore(now)


def dropout(x: torch.Tensor, p: float, generator: torch.Generator) -> torch.Tensor:
    """Zero each element with probability p and scale the others by 1 / (1 - p), drawing from
    `generator`."""
    # torch's dropout takes no generator. The scale stays out of the mask: in bf16, 1 / 0.9 would be
    # 0.16% too small.
    keep = torch.empty_like(x).bernoulli_(1 - p, generator=generator)
    return x * keep * (1 / (1 - p))


@dataclass(frozen=True)
class CounterBasedRng:
    """The layout-independent scheme: no streams, no state. What is drawn depends on the key and on
    where it goes."""

    key: tuple[int, int]
    """Philox key of the dropout masks of a run."""

    @classmethod
    def for_seed(cls, seed: int) -> "CounterBasedRng":
        """The scheme of a run, the same on every rank."""
        return cls(key_of(seed, "dropout"))

    def states(self) -> dict[str, torch.Tensor]:
        """Nothing: there is no state."""
        return {}

    def restore(self, states: dict[str, torch.Tensor]) -> None:
        """Nothing to do."""

    def replay(self, states: dict[str, torch.Tensor]) -> AbstractContextManager[None]:
        """A block in which nothing changes: counted numbers come out the same every time."""
        return nullcontext()


Rng = RngTracker | CounterBasedRng
"""Where dropout's random numbers come from."""
