"""What is known about a bad step: on which rank, in which samples."""

from dataclasses import dataclass

import torch

from megalite.config.run import RunConfig
from megalite.models.batch import Microbatch
from megalite.optim.optimizer import StepResult
from megalite.parallel.collectives import gather_objects
from megalite.system.errors import ReportedError
from megalite.training.build import TrainingComponents

SHOWN = 4
"""Microbatches, or ranks, that a message names."""


class BadStepError(ReportedError, RuntimeError):
    """More steps in a row were bad than allowed; the weights are those of the last good step."""


@dataclass(frozen=True)
class _Findings:
    """What one rank sees of a bad step."""

    part: tuple[int, ...]
    """Its coordinates without that of the data ranks: which part of the model it has."""
    losses: list[str]
    """Microbatches whose loss is not finite."""
    gradients: list[str]
    """Parameters whose gradient, summed over data ranks, is not finite."""
    highest: tuple[float, str]
    """The highest loss of a microbatch, and which one it is."""


def describe_bad_step(components: TrainingComponents, microbatches: list[Microbatch]) -> str:
    """Where a bad step comes from, the same text on every rank.

    Names the microbatches whose loss is not finite, by rank and sample numbers. Without such losses
    it names the parameters whose summed gradient is not finite, or else the microbatch with the
    highest loss. Collective.
    """
    context = components.model.context
    found = gather_objects(_findings(components, microbatches), context.control)
    losses = [text for findings in found for text in findings.losses]
    texts = losses or _bad_sums(found, context.data.size)
    if not texts:
        _, text = max((findings.highest for findings in found), key=lambda highest: highest[0])
        return f"the highest loss is that of {text}"
    more = f"; and {len(texts) - SHOWN} more" if len(texts) > SHOWN else ""
    return "; ".join(texts[:SHOWN]) + more


def _bad_sums(found: list[_Findings], summed: int) -> list[str]:
    """Where sums of gradients over `summed` data ranks are not finite. Only the first of the data
    ranks that have the same parameters is named: the sum does not tell which of them is bad."""
    names: dict[tuple, dict[str, None]] = {}
    ranks: dict[tuple, int] = {}
    for rank, findings in enumerate(found):
        if findings.gradients:
            # Of a sharded buffer each data rank sees its shards.
            names.setdefault(findings.part, {}).update(dict.fromkeys(findings.gradients))
            ranks.setdefault(findings.part, rank)
    texts = []
    over = f", summed over {summed} data-parallel ranks," if summed > 1 else ""
    for part, (first, *others) in names.items():
        more = f" and {len(others)} others" if others else ""
        texts.append(f"on rank {ranks[part]} the gradient of {first}{more}{over} is not finite")
    return texts


def _findings(components: TrainingComponents, microbatches: list[Microbatch]) -> _Findings:
    """What this rank sees. Tensor-parallel ranks see the same losses: the first one reports."""
    context = components.model.context
    losses = []
    highest = (float("-inf"), "")
    for index, terms in components.engine.losses_of.items() if context.tensor.rank == 0 else ():
        samples = microbatches[index].samples
        first, last = samples[0].item(), samples[-1].item()
        rows = f"sample {first}" if first == last else f"samples {first} to {last}"
        rows = f"{rows} on rank {context.rank}"
        loss = terms.sum().item()
        if not torch.isfinite(terms).all():
            losses.append(f"the loss of {rows} is {loss}")
        highest = max(highest, (loss, rows))
    part = tuple(index for axis, index in context.coordinates.items() if axis != "data")
    return _Findings(part, losses, components.optimizer.bad_gradients(), highest)


def stop_at_bad_step(config: RunConfig, iteration: int, update: StepResult) -> None:
    """Raise BadStepError for a bad step that may not be skipped, with what may help."""
    o = config.optimizer
    scaled = ""
    remedies = "a lower --lr, a longer --lr-warmup-iters, or --precision fp32"
    if update.loss_scale != 1:
        scaled = f" at a loss scale of {update.loss_scale:g}"
        remedies = f"a smaller --loss-scale or --min-loss-scale, {remedies}"
    allowed = f"only {o.max_bad_steps} bad steps in a row are skipped (--max-bad-steps)"
    if o.max_bad_steps == 0:
        allowed = "no bad step is skipped (--max-bad-steps 0)"
    raise BadStepError(
        f"iteration {iteration}: {update.bad}{scaled}. The run ends, since {allowed}. The weights "
        "are those of the last good step. Resume from the last checkpoint, or start again, with "
        f"{remedies}."
    )
