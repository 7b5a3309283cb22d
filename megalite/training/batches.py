"""From a dataset to the microbatches of a stage, and the number of items that the loss counts."""

import numpy as np
import torch

from megalite.config.run import RunConfig
from megalite.data.architectures import DATA_OF
from megalite.data.batch_sizes import START, BatchSizes, Point
from megalite.data.indexed import DatasetError
from megalite.data.loader import Loader
from megalite.models.batch import Microbatch
from megalite.parallel.collectives import all_reduce
from megalite.training.prefetch import Prefetcher


class GlobalBatches:
    """Global batches by their first sample, as microbatches of this rank.

    A stage reads the fields that the model's `inputs` name, where the loader has them.
    """

    def __init__(self, loader: Loader, model, sizes: BatchSizes):
        self.loader = loader
        self.model = model
        self.context = model.context
        self.sizes = sizes
        self.fields = model.inputs & loader.fields
        self._arrays = Prefetcher(self._read_arrays)

    def at(self, consumed: int, then: int | None = None) -> tuple[list[Microbatch], torch.Tensor]:
        """The microbatches of the global batch that starts at sample `consumed`, and loss weights.

        The weight of each of the k terms of the loss makes it a mean over the global batch:
        1 / (items that it counts there), float64 [k]. A term that counts nothing has weight 0, and
        so have all terms before the last stage. The samples of the batch that starts at sample
        `then` are read on another thread in the meantime.

        Collective over the data-parallel ranks of the last stage. Raises DatasetError when no term
        counts anything.
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
        """How many items each of the k terms of the loss counts in these microbatches, float64 [k]:
        zeros before the last stage."""
        terms = len(self.model.loss_names)
        counts = torch.zeros(terms, dtype=torch.float64, device=self.context.device)
        if self.model.is_last:
            for batch in batches:
                counts += self.model.loss_counts(batch)
        return counts

    def _read_arrays(self, consumed: int) -> list[dict[str, np.ndarray]]:
        """The loader's arrays of each microbatch; a stage without inputs reads nothing."""
        loader = self.loader
        count = self.sizes.at(consumed) // (loader.micro_batch_size * loader.data_size)
        if not self.fields:
            return [{}] * count
        return [loader.batch(consumed, i) for i in range(count)]

    def _microbatches(self, consumed: int, arrays: list[dict[str, np.ndarray]]) -> list[Microbatch]:
        """Tensors on the device: of the fields that the stage reads, and the samples' numbers."""
        device = self.context.device
        rows = self.loader.micro_batch_size
        batches = []
        for i, read in enumerate(arrays):
            first = self.loader.first_sample(consumed, i)
            batch = Microbatch(samples=torch.arange(first, first + rows, device=device))
            for name in self.fields:
                setattr(batch, name, torch.from_numpy(read[name]).to(device))
            batches.append(batch)
        return batches


def samples_to_read(config: RunConfig, since: Point = START) -> dict[str, int]:
    """How many samples a run reads of each split; for validation, as many as Megatron-LM counts.

    since: iterations and samples that were done before, maybe in batches of other sizes.
    """
    training = config.training
    end = max(training.train_iters, since[0])
    samples = {"train": config.batch_sizes.consumed_after(end, since)}
    if training.eval_interval and training.eval_iters:
        evaluations = training.train_iters // training.eval_interval + 1
        samples["valid"] = evaluations * training.eval_iters * config.data.global_batch_size
    return samples


def build_batches(config: RunConfig, dataset, model, eod: int | None = None) -> GlobalBatches:
    """The global batches of a resolved configuration for one stage of a model.

    `eod` is the token that ends documents; None: the tokenizer's, if the configuration needs one.
    Raises TokenizerError when there is none.
    """
    data_group = model.context.data
    architecture = DATA_OF[config.model.architecture]
    data = architecture(config.data, config.model, config.training.seed, config.bert)
    loader = data.loader(dataset, data_group.size, data_group.rank, eod=eod)
    return GlobalBatches(loader, model, config.batch_sizes)
