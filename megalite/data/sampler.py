"""Which rank reads which samples, and the batches made of them."""

import numpy as np


def first_sample(consumed: int, microbatch: int, micro_batch_size: int, data_size: int, data_rank: int) -> int:
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
        masked_token: positions whose input is this token are left out of the loss (--eod-mask-loss: the end of a
            document says nothing about how the next one begins). None: every position counts.
    """

    def __init__(self, dataset, micro_batch_size: int, data_size: int, data_rank: int, masked_token: int | None = None):
        if micro_batch_size < 1 or not 0 <= data_rank < data_size:
            raise ValueError(
                f"no batches of {micro_batch_size} samples for data-parallel rank {data_rank} of {data_size}"
            )
        self.dataset = dataset
        self.micro_batch_size, self.data_size, self.data_rank = micro_batch_size, data_size, data_rank
        self.masked_token = masked_token

    def batch(self, consumed: int, microbatch: int) -> dict[str, np.ndarray]:
        """Microbatch number `microbatch` of the step before which `consumed` samples were used.

        tokens, labels: int64 [b, s], labels one token ahead; loss_mask: float32 [b, s], 1 where the label counts.
        """
        first = first_sample(consumed, microbatch, self.micro_batch_size, self.data_size, self.data_rank)
        samples = np.stack([self.dataset[first + j] for j in range(self.micro_batch_size)])
        tokens, labels = np.ascontiguousarray(samples[:, :-1]), np.ascontiguousarray(samples[:, 1:])
        if self.masked_token is None:
            loss_mask = np.ones(tokens.shape, np.float32)
        else:
            loss_mask = (tokens != self.masked_token).astype(np.float32)
        return {"tokens": tokens, "labels": labels, "loss_mask": loss_mask}
