"""Sums over all ranks of a few numbers that have names."""

from collections.abc import Sequence

import torch

from megalite.models.stage import Stage
from megalite.parallel.collectives import all_reduce
from megalite.parallel.context import ParallelContext


def sum_over_ranks(values: dict[str, float], context: ParallelContext) -> dict[str, float]:
    """The sum over all ranks of each value, in float64. One all-reduce, collective over the world.

    Every rank passes the same names in the same order.
    """
    total = torch.tensor(list(values.values()), dtype=torch.float64, device=context.device)
    all_reduce(total, context.world)
    return dict(zip(values, total.tolist()))


def last_stage_values(names: Sequence[str], values: torch.Tensor, model: Stage) -> dict[str, float]:
    """Values [k] that the last stage has computed, by name, such that `sum_over_ranks` adds up the
    data-parallel replicas.

    Tensor-parallel ranks all hold the same values: only the first contributes them, the other ranks
    contribute zeros.
    """
    if model.is_last and model.context.tensor.rank == 0:
        return dict(zip(names, values.tolist()))
    return dict.fromkeys(names, 0.0)
