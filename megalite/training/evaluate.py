"""Evaluation: mean loss and scores over batches of the validation split."""

from collections.abc import Callable

import torch

from megalite.data.indexed import DatasetError
from megalite.training.batches import GlobalBatches
from megalite.training.build import TrainingComponents
from megalite.training.metrics import with_total
from megalite.training.signals import Stop
from megalite.training.sum_over_ranks import last_stage_values, sum_over_ranks


def evaluate(
    components: TrainingComponents, data: GlobalBatches, iterations: int, interrupted: Callable
) -> dict[str, float] | Stop:
    """Evaluate the first `iterations` global batches: the same ones each time, to be comparable.

    Returns the mean of each term of the loss and of each score over the items that it counts, by
    name, after the sum of the terms under `loss`. `interrupted` is called before each batch and
    returns a Stop or None: at a Stop, the same on all ranks, the evaluation ends and returns it.

    Collective over the world. Raises DatasetError when no term counts anything.
    """
    model = components.model
    context = model.context
    names = [*model.loss_names, *model.score_names]
    sums = torch.zeros(len(names), dtype=torch.float64, device=context.device)
    counts = torch.zeros(len(model.loss_names), dtype=torch.float64, device=context.device)

    # Sums over this rank's microbatches, in evaluation mode.
    model.eval()
    try:
        for iteration in range(iterations):
            if stop := interrupted():
                return stop
            batches = data.read(iteration * data.sizes.final)
            sums += components.engine.evaluate(batches, torch.ones_like(sums))
            counts += data.counts(batches)
    finally:
        model.train()

    # Sums over all ranks, in one all-reduce. `items` are the keys of the terms' numbers of items,
    # beside the names of terms and scores; no metric has such a name.
    items = [f"items of {name}" for name in model.loss_names]
    values = last_stage_values(names, sums, model) | last_stage_values(items, counts, model)
    totals = sum_over_ranks(values, context)
    if not any(totals[name] for name in items):
        raise DatasetError(f"the loss counts no token of {iterations} validation batches")

    # Means. The items of a score are those of its term.
    terms = _means(model.loss_names, items, totals)
    return with_total(terms) | _means(model.score_names, items, totals)


def _means(names: tuple[str, ...], items: list[str], totals: dict[str, float]) -> dict[str, float]:
    """Each total divided by its number of items; 0 where there are none."""
    means = {}
    for name, count in zip(names, items):
        means[name] = totals[name] / totals[count] if totals[count] else 0.0
    return means
