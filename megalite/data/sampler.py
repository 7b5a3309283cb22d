"""Which rank reads which samples, and the batches made of them."""

import numpy as np


def first_sample(
    consumed: int, microbatch: int, micro_batch_size: int, data_size: int, data_rank: int
) -> int:
    """Index of the sample in row 0 of a rank's microbatch; row j holds the j-th after it.

    The one map from samples to ranks: with `consumed` samples used before this step, b rows in a microbatch and dp
    data-parallel ranks, microbatch i of rank r starts at consumed + i * (dp * b) + r * b. So a global batch is always
    the next samples in order, however it is cut up.
    """
    return consumed + (microbatch * data_size + data_rank) * micro_batch_size


class BatchLoader:
    """Microbatches of one data-parallel rank. It has no position: the count of consumed samples says everything.

    Args:
        dataset: `dataset[i]` gives int64 [s + 1] for any i >= 0.
        micro_batch_size: b, rows in a microbatch.
        data_size, data_rank: the data-parallel size and this rank's place in it.
        eod: the token that ends a document, which the following need.
        eod_mask_loss: leave positions whose input is that token out of the loss: the end of a document says nothing
            about how the next one begins.
        reset_position_ids, reset_attention_mask: give `positions` and `segments` of `documents` as well.
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
        if micro_batch_size < 1 or not 0 <= data_rank < data_size:
            raise ValueError(
                f"no batches of {micro_batch_size} samples for data-parallel rank {data_rank} of {data_size}"
            )
        if eod is None and (eod_mask_loss or reset_position_ids or reset_attention_mask):
            raise ValueError(
                "masks and positions of documents need to know the token that ends one: give eod"
            )
        self.dataset = dataset
        self.micro_batch_size, self.data_size, self.data_rank = (
            micro_batch_size,
            data_size,
            data_rank,
        )
        self.eod, self.eod_mask_loss = eod, eod_mask_loss
        self.fields = {"tokens", "labels", "loss_mask"}
        self.fields |= {"positions"} if reset_position_ids else set()
        self.fields |= {"segments"} if reset_attention_mask else set()

    def batch(self, consumed: int, microbatch: int) -> dict[str, np.ndarray]:
        """Microbatch number `microbatch` of the step before which `consumed` samples were used.

        tokens, labels: int64 [b, s], labels one token ahead; loss_mask: float32 [b, s], 1 where the label counts; and
        where asked for, positions and segments: int64 [b, s]. The names are those in `fields`.
        """
        first = first_sample(
            consumed, microbatch, self.micro_batch_size, self.data_size, self.data_rank
        )
        samples = np.stack([self.dataset[first + j] for j in range(self.micro_batch_size)])
        tokens, labels = np.ascontiguousarray(samples[:, :-1]), np.ascontiguousarray(samples[:, 1:])
        counted = tokens != self.eod if self.eod_mask_loss else np.ones(tokens.shape)
        arrays = {"tokens": tokens, "labels": labels, "loss_mask": counted.astype(np.float32)}
        if self.fields & {"positions", "segments"}:
            arrays["positions"], arrays["segments"] = documents(tokens, self.eod)
        return {name: arrays[name] for name in self.fields}


def documents(tokens: np.ndarray, eod: int) -> tuple[np.ndarray, np.ndarray]:
    """Position of each token of [b, s] in its document, and which document of the row it is in, from 0: int64 [b, s].

    The token `eod` is the last of the document that it ends; the next one is at position 0.
    """
    first = np.zeros(tokens.shape, np.int64)  # 1 where a document begins within the row
    first[:, 1:] = tokens[:, :-1] == eod
    column = np.arange(tokens.shape[1])
    return column - np.maximum.accumulate(first * column, axis=1), np.cumsum(first, axis=1)
