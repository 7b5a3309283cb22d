"""From a dataset to the microbatches a stage needs, and the number of tokens the loss is a mean over."""

import torch

from megalite.data.indexed import DatasetError
from megalite.data.sampler import BatchLoader, first_sample
from megalite.parallel.collectives import all_reduce
from megalite.parallel.context import ParallelContext
from megalite.pipeline.engine import Microbatch


class GlobalBatches:
    """Global batches by their first sample. Only the first and the last stage read tokens."""

    def __init__(
        self, dataset, context: ParallelContext, micro_batch_size: int, global_batch_size: int, masked_token=None
    ):
        layout = context.layout
        self.context = context
        self.microbatches = global_batch_size // (micro_batch_size * layout.data)
        self.loader = BatchLoader(dataset, micro_batch_size, layout.data, context.coordinates.data, masked_token)

    def at(self, consumed: int) -> tuple[list[Microbatch], float]:
        """The microbatches of the global batch that starts at sample `consumed`, and what makes the loss a global mean:
        1 / (unmasked tokens in all of it). Middle stages have nothing to read; all but the last have weight 0.

        Collective over data ranks of the last stage. Raises DatasetError when every token of the batch is masked.
        """
        batches = self.read(consumed)
        if not self.context.is_last_stage:
            return batches, 0.0
        tokens = torch.tensor(unmasked(batches), dtype=torch.float64, device=self.context.device)
        all_reduce(tokens, self.context.data)
        if tokens.item() == 0:
            raise DatasetError(f"every token of the global batch at sample {consumed} is masked out of the loss")
        return batches, 1.0 / tokens.item()

    def read(self, consumed: int) -> list[Microbatch]:
        """This rank's microbatches of the global batch that starts at sample `consumed`."""
        return [self._microbatch(consumed, i) for i in range(self.microbatches)]

    def _microbatch(self, consumed: int, i: int) -> Microbatch:
        context, loader = self.context, self.loader
        first = first_sample(consumed, i, loader.micro_batch_size, loader.data_size, loader.data_rank)
        batch = Microbatch(samples=torch.arange(first, first + loader.micro_batch_size, device=context.device))
        if context.is_first_stage or context.is_last_stage:
            arrays = {name: torch.from_numpy(array) for name, array in loader.batch(consumed, i).items()}
            if context.is_first_stage:
                batch.tokens = arrays["tokens"].to(context.device)
            if context.is_last_stage:
                batch.labels = arrays["labels"].to(context.device)
                batch.loss_mask = arrays["loss_mask"].to(context.device)
        return batch


def unmasked(batches: list[Microbatch]) -> float:
    """Number of tokens these microbatches count in the loss (on the last stage)."""
    return sum(batch.loss_mask.sum(dtype=torch.float64).item() for batch in batches)
