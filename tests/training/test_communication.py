"""The bytes of one step's collectives, by group and kind, against what the layout has to send."""

import pytest

from megalite.training.communication import communication_table
from tests.layouts import GPT2, Layout, sp
from tests.tiny import build

SIZES = {"tp": 2, "pp": 2, "dp": 2}
LAYERS = GPT2.layers // SIZES["pp"]
MICROBATCHES = 4
FP32 = 4
NUMBER = 8
"""Bytes of a norm, or of a number of tokens."""
HIDDEN_STATES = FP32 * GPT2.seq * GPT2.hidden
"""Bytes of [s, b, h] with one row."""
EMBEDDING = FP32 * 8192
"""Of a rank's shard of the word embedding: 257 rows, padded to 512, of 32, over 2 ranks."""


def sent_in_a_step(launch, layout: Layout) -> tuple[dict, int, int, str]:
    """{(group, kind): bytes of all calls in a step}; bytes of the gradient buffer, and of its part
    that is summed over tensor ranks; the table."""
    tiny = build(layout, launch, precision="fp32")
    tiny.train(1)
    tiny.context.activity.count_traffic()
    tiny.train(2)
    traffic = tiny.context.activity.take_traffic()
    gradients = tiny.components.optimizer.gradients
    buckets = gradients.layout.buckets
    partial = sum(
        bucket.stop - bucket.start for bucket in buckets if "tensor" in bucket.summed_over
    )
    table = communication_table(traffic, tiny.context)
    sent = {key: counted.bytes for key, counted in traffic.items()}
    return sent, FP32 * gradients.layout.total, FP32 * partial, table


SUMS_OF_HIDDEN_STATES = MICROBATCHES * (4 * LAYERS + 1)
"""Sums of [s, b, h] over tensor ranks: two in a layer's forward and two in its backward; one more
for the embedding, or for the input of the output layer."""


def of_the_loss(is_last: bool) -> int:
    """Bytes that the vocabulary-parallel cross-entropy sends: a maximum and two sums a token."""
    return MICROBATCHES * 3 * FP32 * GPT2.seq if is_last else 0


def transfers(length: int) -> int:
    """Bytes of what passes between the two stages, forward and backward."""
    return MICROBATCHES * 2 * FP32 * length * GPT2.hidden


@pytest.mark.parametrize("flags", [{}, {"overlap_grad_reduce": True, "ddp_bucket_size": 5000}])
def test_a_step_sends_what_the_plain_layout_needs(pool, flags):
    layout = Layout("plain", **SIZES, flags=flags)
    results = pool.run(sent_in_a_step, layout.world_size, layout)
    for rank, (sent, buffer, _, _) in enumerate(results):
        is_last = rank >= 4
        assert sent == {
            # The gradients; on the last stage the number of tokens.
            ("data", "all_reduce"): buffer + NUMBER * is_last,
            ("embedding", "all_reduce"): EMBEDDING,
            # The norm.
            ("world", "all_reduce"): NUMBER,
            ("pipeline", "transfer"): transfers(GPT2.seq),
            ("tensor", "all_reduce"): SUMS_OF_HIDDEN_STATES * HIDDEN_STATES + of_the_loss(is_last),
        }


def test_a_sharded_optimizer_under_sequence_parallelism_sends_shards(pool):
    """Reductions and gathers of whole tensors in place of all-reduces; sums over other ranks of
    shards only."""
    layout = Layout("sharded", **SIZES, flags=sp(use_distributed_optimizer=True))
    results = pool.run(sent_in_a_step, layout.world_size, layout)
    for rank, (sent, buffer, partial, table) in enumerate(results):
        assert table == results[0][3]
        is_last = rank >= 4
        # Inputs of column-parallel layers are gathered again in the backward; the last stage
        # gathers those of the output layer, the first the gradient of the embedding's output.
        gathers = MICROBATCHES * (6 * LAYERS + (2 if is_last else 1))
        assert sent == {
            ("data", "all_to_all"): buffer,
            ("data", "all_gather"): buffer,
            # The number of tokens.
            **({("data", "all_reduce"): NUMBER} if is_last else {}),
            ("embedding", "all_reduce"): EMBEDDING // 2,
            ("world", "all_reduce"): NUMBER,
            ("pipeline", "transfer"): transfers(GPT2.seq // 2),
            ("tensor", "all_gather"): gathers * HIDDEN_STATES,
            ("tensor", "all_to_all"): SUMS_OF_HIDDEN_STATES * HIDDEN_STATES,
            ("tensor", "all_reduce"): partial // 2 + of_the_loss(is_last),
        }

    # The table has the rank with most bytes of each kind, the lowest of several.
    titles, *lines = [line.split() for line in table.splitlines()]
    assert titles == ["group", "kind", "rank", "calls", "MB", "ms", "GB/s"]
    kinds = {key for result in results for key in result[0]}
    assert len(lines) == len(kinds)
    for group, kind, rank, calls, megabytes, milliseconds, bandwidth in lines:
        bytes_of_ranks = [result[0].get((group, kind), 0) for result in results]
        assert int(rank) == bytes_of_ranks.index(max(bytes_of_ranks))
        assert megabytes == f"{max(bytes_of_ranks) / 1e6:.3f}"
        assert int(calls) > 0
        # Both are rounded to two digits after the point.
        wanted = max(bytes_of_ranks) / 1e6
        within = 0.005 * (float(milliseconds) + float(bandwidth)) + 0.005**2
        assert float(milliseconds) * float(bandwidth) == pytest.approx(wanted, abs=within)


@pytest.mark.parametrize(
    ("flags", "group", "replicas"),
    [({}, "tensor", 2), ({"use_distributed_optimizer": True}, "tensor x data", 1)],
)
def test_muon_sends_each_element_to_one_rank_and_back(pool, flags, group, replicas):
    """Without a sharded optimizer, in each replica."""
    layout = Layout("muon", **SIZES, flags={"optimizer": "muon", **flags})
    plain = Layout("adam", **SIZES, flags=flags)
    matrices = 12 * GPT2.hidden**2 * GPT2.layers
    found = pool.run(sent_in_a_step, layout.world_size, layout)
    usual = pool.run(sent_in_a_step, layout.world_size, plain)
    assert (
        sum(sent.pop((group, "all_to_all")) for sent, *_ in found) == 2 * FP32 * matrices * replicas
    )
    assert [sent for sent, *_ in found] == [sent for sent, *_ in usual]
