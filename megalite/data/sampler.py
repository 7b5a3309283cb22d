"""The samples of each rank, and the batches made of them."""

import numpy as np


def first_sample(
    consumed: int, microbatch: int, micro_batch_size: int, data_size: int, data_rank: int
) -> int:
    """Index of the sample in row 0 of a rank's microbatch; row j holds the j-th after it.

    The one map from samples to ranks: with `consumed` samples used before this step, b rows in a
    microbatch and dp data-parallel ranks, microbatch i of rank r starts at sample
    consumed + i * (dp * b) + r * b. A global batch is the next samples in order in every layout.
    """
    return consumed + (microbatch * data_size + data_rank) * micro_batch_size


class Loader:
    """Reads the samples of one data-parallel rank, one microbatch at a time.

    It keeps no position: the number of consumed samples determines what is read.

    Args:
        dataset: `dataset[i]` gives sample i >= 0.
        micro_batch_size: b, rows in a microbatch.
        data_size, data_rank: the data-parallel size, and this rank's coordinate.

    Raises ValueError for sizes that make no batches.
    """

    fields: frozenset[str]
    """Names of the arrays in a batch."""

    def __init__(self, dataset, micro_batch_size: int, data_size: int, data_rank: int):
        if micro_batch_size < 1 or not 0 <= data_rank < data_size:
            raise ValueError(
                f"no batches of {micro_batch_size} samples for data-parallel rank {data_rank} of "
                f"{data_size}"
            )
        self.dataset = dataset
        self.micro_batch_size = micro_batch_size
        self.data_size = data_size
        self.data_rank = data_rank

    def samples(self, consumed: int, microbatch: int) -> list:
        """The b samples of microbatch number `microbatch` of a step.

        consumed: samples used before the step.
        """
        rows = self.micro_batch_size
        first = first_sample(consumed, microbatch, rows, self.data_size, self.data_rank)
        return [self.dataset[first + row] for row in range(rows)]

    def batch(self, consumed: int, microbatch: int) -> dict[str, np.ndarray]:
        """The arrays of a microbatch, by the names in `fields`; see `samples` for the arguments."""
        raise NotImplementedError


class BatchLoader(Loader):
    """Microbatches of samples of s + 1 tokens, int64.

    Args:
        dataset, micro_batch_size, data_size, data_rank: see Loader.
        eod: id of the token that ends a document; the following options need it.
        eod_mask_loss: leave positions whose input is that token out of the loss, since the end of
            a document does not determine how the next one begins.
        reset_position_ids: batches have `positions`, which restart at 0 in each document.
        reset_attention_mask: batches have `segments`, the index of each token's document.

    Raises ValueError for sizes that make no batches, and when an option needs `eod`.
    """

    def __init__(
        self,
        dataset,
        micro_batch_size: int,
        data_size: int,
        data_rank: int,
        *,
        eod: int | None = None,
        eod_mask_loss: bool = False,
        reset_position_ids: bool = False,
        reset_attention_mask: bool = False,
    ):
        super().__init__(dataset, micro_batch_size, data_size, data_rank)
        if eod is None and (eod_mask_loss or reset_position_ids or reset_attention_mask):
            raise ValueError(
                "masks and positions of documents need the id of the token that ends one: give eod"
            )
        self.eod = eod
        self.eod_mask_loss = eod_mask_loss
        fields = {"tokens", "labels", "loss_mask"}
        if reset_position_ids:
            fields.add("positions")
        if reset_attention_mask:
            fields.add("segments")
        self.fields = frozenset(fields)

    def batch(self, consumed: int, microbatch: int) -> dict[str, np.ndarray]:
        """Microbatch number `microbatch` of the step before which `consumed` samples were used.

        tokens, labels: int64 [b, s], labels one token ahead. loss_mask: float32 [b, s], 1 where the
        label counts. positions and segments, if requested: int64 [b, s].
        """
        samples = np.stack(self.samples(consumed, microbatch))
        tokens = np.ascontiguousarray(samples[:, :-1])
        loss_mask = np.ones(tokens.shape, np.float32)
        if self.eod_mask_loss:
            loss_mask[tokens == self.eod] = 0
        arrays = {
            "tokens": tokens,
            "labels": np.ascontiguousarray(samples[:, 1:]),
            "loss_mask": loss_mask,
        }
        if self.fields & {"positions", "segments"}:
            arrays["positions"], arrays["segments"] = documents(tokens, self.eod)
        return {name: arrays[name] for name in self.fields}


class BertLoader(Loader):
    """Microbatches of the samples of a BertDataset."""

    fields = frozenset(
        ("tokens", "token_types", "segments", "labels", "loss_mask", "pair_label", "pair_mask")
    )

    def batch(self, consumed: int, microbatch: int) -> dict[str, np.ndarray]:
        """Microbatch number `microbatch` of the step before which `consumed` samples were used.

        The arrays of BertDataset's samples, stacked to [b, s], and to [b] for the pair's label and
        mask.
        """
        samples = self.samples(consumed, microbatch)
        return {name: np.stack([sample[name] for sample in samples]) for name in samples[0]}


def documents(tokens: np.ndarray, eod: int) -> tuple[np.ndarray, np.ndarray]:
    """(positions, segments) of tokens [b, s]: each token's position in its document, and the index
    of the document in its row, from 0. Both int64 [b, s].

    The token `eod` belongs to the document that it ends; the next token has position 0.
    """
    first = np.zeros(tokens.shape, np.int64)  # 1 where a document begins within the row
    first[:, 1:] = tokens[:, :-1] == eod
    column = np.arange(tokens.shape[1])
    positions = column - np.maximum.accumulate(first * column, axis=1)
    return positions, np.cumsum(first, axis=1)
