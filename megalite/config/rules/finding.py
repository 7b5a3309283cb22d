"""What rules are made of: the Finding, and the numbers that several of them need. Imports no torch."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from megalite.config.run import RunConfig

EXAMPLES = {"vocab_size": 8192, "train_iters": 1000}
"""Values offered for fields that have no default but are needed."""
PATHS = ("data_path", "train_data_path", "valid_data_path")
"""Fields that name datasets."""


@dataclass(frozen=True)
class Finding:
    """What a rule found: a Problem whose fix is still to be chosen."""

    message: str
    flags: tuple[str, ...]
    """Every field that the rule looked at for this."""
    candidates: tuple[dict[str, Any] | str, ...]
    """Changes of fields that may help, best first (world_size: the number of ranks), or advice in words."""


Rule = Callable[[RunConfig, int], Iterable[Finding]]
"""A function of (config, world_size) that yields a Finding for each thing wrong."""


def divisors(number: int, most: int) -> list[int]:
    """Divisors of a number up to `most`, the largest first."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({d for d in (*small, *(number // d for d in small)) if d <= most}, reverse=True)


def multiples(step: int, near: int, count: int = 2) -> list[int]:
    """The positive multiples of `step` nearest to a number, nearest first."""
    around = range(max(1, near // step - count), near // step + count + 1)
    return sorted((step * k for k in around), key=lambda n: abs(n - near))[:count]


def data_parallel_size(config: RunConfig, world_size: int) -> int:
    """World size / (tp * pp), at least 1."""
    split = (
        config.parallel.tensor_model_parallel_size * config.parallel.pipeline_model_parallel_size
    )
    return max(1, world_size // split)


def global_batch(config: RunConfig, world_size: int) -> int:
    """Global batch size, with its default filled in."""
    default = config.data.micro_batch_size * data_parallel_size(config, world_size)
    return config.data.global_batch_size or default


def iterations(config: RunConfig, world_size: int) -> int | None:
    """Iterations to train for, from samples if need be."""
    samples = config.training.train_samples
    return config.training.train_iters or (
        samples // global_batch(config, world_size) if samples else None
    )


def wanted_splits(config: RunConfig) -> tuple[str, ...]:
    """The splits that the run reads."""
    evaluates = config.training.eval_interval and config.training.eval_iters
    return ("train", "valid") if evaluates else ("train",)
