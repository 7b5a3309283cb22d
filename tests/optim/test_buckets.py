"""Buckets of parameters and their shards, against sets of elements."""

import pytest
import torch

from megalite.nn.parameter import ParameterSpec, held_boxes, make_parameter
from megalite.optim.buckets import ALIGNMENT, BucketLayout
from megalite.parallel.boxes import Box

CPU = torch.device("cpu")


def parameter(*shape: int, rows: int | None = None, **spec) -> torch.nn.Parameter:
    """One with a whole global shape, and `rows` rows in memory."""
    local = (rows or shape[0], *shape[1:])
    facts = ParameterSpec(global_shape=shape, box=Box.whole(shape), init="zeros", **spec)
    return make_parameter(local, facts, torch.float32, CPU)


PARAMETERS = {
    "embedding": parameter(50, 4, rows=64, sharded=()),
    "norm.weight": parameter(4, partial=("tensor",)),
    "up": parameter(16, 4),
    "up.bias": parameter(16),
    "down": parameter(4, 16),
    "final.weight": parameter(4, partial=("tensor",)),
}


def names_of(layout: BucketLayout) -> list[tuple[str, ...]]:
    return [bucket.names for bucket in layout.buckets]


def test_buckets_are_in_the_order_of_a_backward():
    layout = BucketLayout(PARAMETERS, tied=False, bucket_size=70)
    assert names_of(layout) == [
        ("down", "up.bias"),
        ("up", "embedding"),
        ("final.weight", "norm.weight"),
    ]
    assert [bucket.summed_over for bucket in layout.buckets] == [(), (), ("tensor",)]


def test_without_a_size_there_is_one_bucket_for_each_kind_of_sum():
    layout = BucketLayout(PARAMETERS, tied=True)
    assert names_of(layout) == [
        ("embedding",),
        ("final.weight", "norm.weight"),
        ("down", "up.bias", "up"),
    ]
    assert [bucket.summed_over for bucket in layout.buckets] == [("embedding",), ("tensor",), ()]
    assert layout.total == sum(p.numel() for p in PARAMETERS.values())


@pytest.mark.parametrize("shards", [1, 2, 3, 8])
@pytest.mark.parametrize("bucket_size", [None, 1, 100])
def test_shards_hold_every_element_once(shards, bucket_size):
    layout = BucketLayout(PARAMETERS, tied=True, bucket_size=bucket_size, shards=shards)
    seen = {name: torch.zeros(p.shape, dtype=torch.int) for name, p in PARAMETERS.items()}
    real = {
        name: torch.zeros(p.spec.global_shape, dtype=torch.int) for name, p in PARAMETERS.items()
    }
    for index in range(shards):
        for name, (start, stop) in layout.ranges_of_shard(PARAMETERS, index).items():
            seen[name].view(-1)[start:stop] += 1
            ones = torch.ones(stop - start, dtype=torch.int)
            for box, values in held_boxes(PARAMETERS[name], ones, (start, stop)):
                real[name][box.slices_in(Box.whole(tuple(real[name].shape)))] += values
    assert all(count.eq(1).all() for count in [*seen.values(), *real.values()])
    for bucket in layout.buckets:
        sizes = {stop - start for start, stop in (bucket.shard(i, shards) for i in range(shards))}
        assert len(sizes) == 1
        assert shards == 1 or sizes.pop() % ALIGNMENT == 0


def test_the_copies_of_a_tied_embedding_have_equal_shards():
    """On first and last stage, which hold other parameters beside it."""
    first = {name: PARAMETERS[name] for name in ("embedding", "up")}
    last = {name: PARAMETERS[name] for name in ("embedding", "down", "final.weight")}
    for index in range(3):
        owned = [
            BucketLayout(held, tied=True, shards=3).ranges_of_shard(held, index).get("embedding")
            for held in (first, last)
        ]
        assert owned[0] == owned[1]
