"""From a dataset to the microbatches a stage needs, and the number of items that the loss is a mean over."""

import numpy as np
import torch

from megalite.config.run import RunConfig
from megalite.data.architectures import DATA_OF, SampleConfig
from megalite.data.indexed import DatasetError
from megalite.data.sampler import Loader, first_sample
from megalite.models.batch import Microbatch
from megalite.parallel.collectives import all_reduce
from megalite.training.prefetch import Prefetcher


class GlobalBatches:
    """Global batches by their first sample. A stage of the model reads what its `inputs` name, if the loader has it."""

    def __init__(self, loader: Loader, model, global_batch_size: int):
        self.loader, self.model, self.context = loader, model, model.context
        self.microbatches = global_batch_size // (loader.micro_batch_size * loader.data_size)
        self.fields = model.inputs & loader.fields
        self._arrays = Prefetcher(self._read_arrays)

    def at(self, consumed: int, then: int | None = None) -> tuple[list[Microbatch], torch.Tensor]:
        """The microbatches of the global batch that starts at sample `consumed`, and what makes each of the k terms of
        the loss a global mean: 1 / (items that it counts in all of the batch), fp64 [k]. A term that counts nothing has
        weight 0, and so have all terms before the last stage. The samples of the batch that starts at sample `then` are
        read meanwhile, on another thread.

        Collective over data ranks of the last stage. Raises DatasetError when no term counts anything.
        """
        batches = self._microbatches(consumed, self._arrays.get(consumed, then))
        counts = self.counts(batches)
        if not self.model.is_last:
            return batches, counts
        all_reduce(counts, self.context.data)
        if not counts.any():
            raise DatasetError(f"the loss counts no token of the global batch at sample {consumed}")
        return batches, torch.where(counts > 0, 1.0 / counts, 0.0)

    def read(self, consumed: int) -> list[Microbatch]:
        """This rank's microbatches of the global batch that starts at sample `consumed`."""
        return self._microbatches(consumed, self._read_arrays(consumed))

    def close(self) -> None:
        """End the reading thread."""
        self._arrays.close()

    def counts(self, batches: list[Microbatch]) -> torch.Tensor:
        """How many items each of the k terms of the loss counts in these microbatches, fp64 [k]: zeros before the last
        stage."""
        counts = torch.zeros(
            len(self.model.loss_names), dtype=torch.float64, device=self.context.device
        )
        for batch in batches if self.model.is_last else []:
            counts += self.model.loss_counts(batch)
        return counts

    def _read_arrays(self, consumed: int) -> list[dict[str, np.ndarray]]:
        """What the stage needs of each microbatch; nothing is read where it needs nothing."""
        return [
            self.loader.batch(consumed, i) if self.fields else {} for i in range(self.microbatches)
        ]

    def _microbatches(self, consumed: int, arrays: list[dict[str, np.ndarray]]) -> list[Microbatch]:
        device, loader, batches = self.context.device, self.loader, []
        for i, read in enumerate(arrays):
            first = first_sample(
                consumed, i, loader.micro_batch_size, loader.data_size, loader.data_rank
            )
            batch = Microbatch(
                samples=torch.arange(first, first + loader.micro_batch_size, device=device)
            )
            for name in self.fields:
                setattr(batch, name, torch.from_numpy(read[name]).to(device))
            batches.append(batch)
        return batches


def build_batches(config: RunConfig, dataset, model, eod: int | None = None) -> GlobalBatches:
    """The global batches of a resolved configuration for one stage of a model.

    `eod` is the token that ends documents; None: the tokenizer's, if the configuration needs one. Raises TokenizerError
    when there is none.
    """
    data_group = model.context.data
    samples = SampleConfig(config.data, config.model, config.training.seed, config.bert)
    build_loader = DATA_OF[config.model.architecture].loader
    loader = build_loader(samples, dataset, data_group.size, data_rank=data_group.rank, eod=eod)
    return GlobalBatches(loader, model, config.data.global_batch_size)
