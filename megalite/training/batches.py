"""From a dataset to the microbatches a stage needs, and the number of tokens the loss is a mean over."""

import torch

from megalite.data.sampler import BatchLoader
from megalite.parallel.collectives import all_reduce
from megalite.parallel.context import ParallelContext
from megalite.pipeline.engine import Microbatch


class GlobalBatches:
    """Global batches by their first sample. Only the first and the last stage read tokens."""

    def __init__(self, dataset, context: ParallelContext, micro_batch_size: int, global_batch_size: int, masked_token=None):
        layout = context.layout
        self.context = context
        self.microbatches = global_batch_size // (micro_batch_size * layout.data)
        self.loader = BatchLoader(dataset, micro_batch_size, layout.data, context.coordinates.data, masked_token)

    def at(self, consumed: int) -> tuple[list[Microbatch], float]:
        """The microbatches of the batch that starts at sample `consumed`, and 1 / (unmasked tokens in the whole batch).

        Collective over data ranks of the last stage. Raises ValueError when every token of the batch is masked.
        """
        context = self.context
        if not (context.is_first_stage or context.is_last_stage):
            return [Microbatch() for _ in range(self.microbatches)], 0.0
        batches = [self._microbatch(self.loader.batch(consumed, i)) for i in range(self.microbatches)]
        if not context.is_last_stage:
            return batches, 0.0
        tokens = torch.stack([batch.loss_mask.sum(dtype=torch.float64) for batch in batches]).sum()
        all_reduce(tokens, context.data)
        if tokens.item() == 0:
            raise ValueError(f"every token of the global batch at sample {consumed} is masked out of the loss")
        return batches, 1.0 / tokens.item()

    def _microbatch(self, arrays: dict) -> Microbatch:
        def to_device(name):
            return torch.from_numpy(arrays[name]).to(self.context.device)

        context = self.context
        batch = Microbatch(tokens=to_device("tokens") if context.is_first_stage else None)
        if context.is_last_stage:
            batch.labels, batch.loss_mask = to_device("labels"), to_device("loss_mask")
        return batch
