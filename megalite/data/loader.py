"""The samples of each rank, and the batches made of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

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


@dataclass(eq=False)
class Loader:
    """Reads the samples of one data-parallel rank, one microbatch at a time.

    It keeps no position: the number of consumed samples determines what is read. Subclasses have
    `fields`, the names of the arrays in a batch, and `batch(consumed, microbatch)`.

    Raises ValueError for sizes that make no batches.
    """

    dataset: Sequence
    """`dataset[i]` gives sample i >= 0."""
    micro_batch_size: int
    """b, rows in a microbatch."""
    data_size: int
    data_rank: int
    """This rank's data-parallel coordinate."""

    def __post_init__(self):
        if self.micro_batch_size < 1 or not 0 <= self.data_rank < self.data_size:
            raise ValueError(
                f"no batches of {self.micro_batch_size} samples for data-parallel rank "
                f"{self.data_rank} of {self.data_size}"
            )

    def first_sample(self, consumed: int, microbatch: int) -> int:
        """Index of the sample in row 0 of microbatch number `microbatch` of a step.

        consumed: samples used before the step.
        """
        rows = self.micro_batch_size
        return first_sample(consumed, microbatch, rows, self.data_size, self.data_rank)

    def samples(self, consumed: int, microbatch: int) -> list:
        """The b samples of microbatch number `microbatch` of a step.

        consumed: samples used before the step.
        """
        first = self.first_sample(consumed, microbatch)
        return [self.dataset[first + row] for row in range(self.micro_batch_size)]


@dataclass(eq=False)
class GPTLoader(Loader):
    """Microbatches of samples of s + 1 tokens, int64.

    Raises ValueError for sizes that make no batches, and when an option needs `eod`.
    """

    eod: int | None = None
    """Id of the token that ends a document; the following options need it."""
    eod_mask_loss: bool = False
    """Leave positions whose input is that token out of the loss, since the end of a document does
    not determine how the next one begins."""
    reset_position_ids: bool = False
    """Batches have `positions`, which restart at 0 in each document."""
    reset_attention_mask: bool = False
    """Batches have `segments`, the index of each token's document."""

    def __post_init__(self):
        super().__post_init__()
        if self.eod is None and (self.eod_mask_loss or self.fields & {"positions", "segments"}):
            raise ValueError(
                "masks and positions of documents need the id of the token that ends one: give eod"
            )

    @cached_property
    def fields(self) -> frozenset[str]:
        """Names of the arrays in a batch."""
        fields = ["tokens", "labels", "loss_mask"]
        fields += ["positions"] * self.reset_position_ids
        fields += ["segments"] * self.reset_attention_mask
        return frozenset(fields)

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
