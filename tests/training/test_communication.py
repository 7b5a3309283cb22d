"""The collectives of one step, by group, kind and size, against what the layout has to send."""

from collections import Counter

import pytest

from tests.layouts import GPT2, Layout, sp
from tests.tiny import build

SIZES = {"tp": 2, "pp": 2, "dp": 2}
LAYERS = GPT2.layers // SIZES["pp"]
MICROBATCHES = 4
HIDDEN_STATES = GPT2.seq * GPT2.hidden
"""Elements of [s, b, h] with one row."""
EMBEDDING = 8192
"""Of a rank's shard of the word embedding: 257 rows, padded to 512, of 32, over 2 ranks."""


def elements_sent(launch, layout: Layout) -> tuple[Counter, int, int]:
    """{(group, kind): elements of all calls in a step}; elements of the gradient buffer, and of its
    part that is summed over tensor ranks."""
    tiny = build(layout, launch, precision="fp32")
    tiny.train(1)
    sent = Counter()
    record = tiny.context.activity.record

    def counted(kind, group, ranks, shape=(), **rest):
        elements = 1
        for length in shape:
            elements *= length
        sent[group, kind] += elements
        return record(kind, group, ranks, shape=shape, **rest)

    tiny.context.activity.record = counted
    tiny.train(2)
    buckets = tiny.components.optimizer.gradients.layout.buckets
    partial = sum(bucket.stop - bucket.start for bucket in buckets if "tensor" in bucket.sums)
    return sent, tiny.components.optimizer.gradients.layout.total, partial


SUMS_OF_HIDDEN_STATES = MICROBATCHES * (4 * LAYERS + 1)
"""Sums of [s, b, h] over tensor ranks: two in a layer's forward and two in its backward; one more
for the embedding, or for the input of the output layer."""


def of_the_loss(is_last: bool) -> int:
    """Elements that the vocabulary-parallel cross-entropy sends: a maximum and two sums a token."""
    return MICROBATCHES * 3 * GPT2.seq if is_last else 0


def transfers(length: int) -> int:
    """Elements of what passes between the two stages, forward and backward."""
    return MICROBATCHES * 2 * length * GPT2.hidden


@pytest.mark.parametrize("flags", [{}, {"overlap_grad_reduce": True, "ddp_bucket_size": 5000}])
def test_a_step_sends_what_the_plain_layout_needs(pool, flags):
    layout = Layout("plain", **SIZES, flags=flags)
    for rank, (sent, buffer, _) in enumerate(pool.run(elements_sent, layout.world_size, layout)):
        is_last = rank >= 4
        assert sent == {
            # The gradients; on the last stage the number of tokens.
            ("data", "all_reduce"): buffer + int(is_last),
            ("embedding", "all_reduce"): EMBEDDING,
            # The norm.
            ("pipeline", "all_reduce"): 1,
            ("pipeline", "transfer"): transfers(GPT2.seq),
            ("tensor", "all_reduce"): 1
            + SUMS_OF_HIDDEN_STATES * HIDDEN_STATES
            + of_the_loss(is_last),
        }


def test_a_sharded_optimizer_under_sequence_parallelism_sends_shards(pool):
    """Reductions and gathers in place of all-reduces; sums over other ranks of shards only."""
    layout = Layout("sharded", **SIZES, flags=sp(use_distributed_optimizer=True))
    for rank, (sent, buffer, partial) in enumerate(
        pool.run(elements_sent, layout.world_size, layout)
    ):
        is_last = rank >= 4
        # Inputs of column-parallel layers are gathered again in the backward; the last stage
        # gathers those of the output layer, the first the gradient of the embedding's output.
        gathers = MICROBATCHES * (6 * LAYERS + (2 if is_last else 1))
        assert sent == {
            ("data", "all_to_all"): buffer,
            ("data", "all_gather"): buffer // 2,
            ("data", "all_reduce"): 1 + int(is_last),
            ("embedding", "all_reduce"): EMBEDDING // 2,
            ("pipeline", "all_reduce"): 1,
            ("pipeline", "transfer"): transfers(GPT2.seq // 2),
            ("tensor", "all_gather"): gathers * HIDDEN_STATES // 2,
            ("tensor", "all_to_all"): SUMS_OF_HIDDEN_STATES * HIDDEN_STATES,
            ("tensor", "all_reduce"): 1 + partial // 2 + of_the_loss(is_last),
        }
