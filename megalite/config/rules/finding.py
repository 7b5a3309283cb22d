"""What rules are made of: the Finding, and the numbers that several of them need. Imports no
torch."""

import math
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache
from typing import Any

from megalite.config.run import RunConfig, options
from megalite.data.batch_sizes import BatchSizes
from megalite.models.shapes import stage_shapes
from megalite.optim.schedule import Schedule


class Finding:
    """What a rule found: a Problem whose fixes are still to be tried.

    Args:
        message: what is wrong.
        fixes: possible fixes, best first: changes of fields (world_size: the number of ranks), or
            advice in words.
        also: fields that the rule looked at and that may have a senseless value, beside those whose
            flags are in the message.
    """

    def __init__(self, message: str, *fixes: dict[str, Any] | str, also: tuple[str, ...] = ()):
        self.message = message
        self.fixes = fixes
        flags = re.findall("--[a-z0-9-]+", message)
        self.keys = (*filter(None, map(_keys_by_flag().get, flags)), *also)


Rule = Callable[[RunConfig, int], Iterable[Finding]]
"""A function of (config, world_size) that yields a Finding for each thing wrong."""


@cache
def _keys_by_flag() -> dict[str, str]:
    """The key of each flag of a run, of the opposite of a switch too."""
    keys = {}
    for key, option in options().items():
        keys |= dict.fromkeys([*option.flags, *option.switches], key)
    return keys


def flag_of(key: str) -> str:
    """The full flag of a field: --tokenizer-model."""
    return options()[key].flag


def example_of(key: str) -> dict[str, Any]:
    """A change that gives a field its example, for one that has no default but is needed."""
    return {key: options()[key].usual}


def without_evaluation() -> dict[str, Any]:
    """The change that turns evaluation off."""
    return {"eval_interval": 0, "eval_iters": 0}


def each(key: str, values: Iterable[Any]) -> list[dict[str, Any]]:
    """A possible fix for each value of one field."""
    return [{key: value} for value in values]


def divisors(number: int, most: int) -> list[int]:
    """Divisors of a number up to `most`, the largest first."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    every = {*small, *(number // d for d in small)}
    return sorted((d for d in every if d <= most), reverse=True)


def multiples(step: int, near: int, count: int = 2) -> list[int]:
    """The positive multiples of `step` nearest to a number, nearest first."""
    around = range(max(1, near // step - count), near // step + count + 1)
    return sorted((step * k for k in around), key=lambda n: abs(n - near))[:count]


def data_parallel_size(config: RunConfig, world_size: int) -> int:
    """World size / (tp * pp), at least 1."""
    p = config.parallel
    return max(1, world_size // (p.tensor_model_parallel_size * p.pipeline_model_parallel_size))


def global_batch(config: RunConfig, world_size: int) -> int:
    """Global batch size, with its default filled in."""
    d = config.data
    return d.global_batch_size or d.micro_batch_size * data_parallel_size(config, world_size)


def batch_sizes(config: RunConfig, world_size: int) -> BatchSizes:
    """Sizes of the global batches, with defaults filled in; without a ramp that makes no sense."""
    final = global_batch(config, world_size)
    with suppress(ValueError):
        return BatchSizes.from_words(final, config.data.rampup_batch_size)
    return BatchSizes(final)


def iterations(config: RunConfig, world_size: int) -> int | None:
    """Iterations to train for, from samples or tokens if need be; None when no length is given."""
    sizes = batch_sizes(config, world_size)
    return config.training.train_iters or config.iterations_of_samples(sizes)


def schedule(config: RunConfig, world_size: int) -> Schedule:
    """Schedules of learning rate and weight decay; of length 0 when it is not known."""
    steps = iterations(config, world_size) or 0
    samples = batch_sizes(config, world_size).consumed_after(steps)
    return Schedule.of_run(config.optimizer, iterations=steps, samples=samples)


def parameter_names(config: RunConfig) -> list[str]:
    """Names of all parameters of the model."""
    layers = range(config.model.num_layers)
    return list(stage_shapes(config.model, config.head_cost, layers, rows=1))


def wanted_splits(config: RunConfig) -> tuple[str, ...]:
    """The splits that the run reads."""
    evaluates = config.training.eval_interval and config.training.eval_iters
    return ("train", "valid") if evaluates else ("train",)
