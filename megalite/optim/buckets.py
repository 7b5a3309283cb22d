"""How a rank's parameters lie in flat buffers: buckets, and the shard of each that a data rank
updates. Pure arithmetic."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

ALIGNMENT = 32
"""Where a buffer is sharded, parameters and shards begin at multiples of this many elements: at
whole cache lines, as tensors of their own do. Matrix products round differently otherwise."""


@dataclass(frozen=True)
class Bucket:
    """Parameters whose gradients are reduced in one call: a range of the flat buffer."""

    names: tuple[str, ...]
    start: int
    stop: int
    """Exclusive; padding included."""
    summed_over: tuple[str, ...] = ()
    """What the gradients are summed over beside the data ranks: axes, or "embedding" for the copies
    of a tied embedding on first and last stage."""

    def shard(self, index: int, count: int) -> tuple[int, int]:
        """(start, stop) in the flat buffer of shard `index` of `count` equal ones."""
        size = (self.stop - self.start) // count
        return self.start + index * size, self.start + (index + 1) * size


class BucketLayout:
    """The buckets of a model's parameters, in the order in which a backward completes them.

    Parameters that are summed over the same ranks share buckets. A tied embedding has a bucket of
    its own, so that the shards of its two copies cover the same elements.

    Args:
        parameters: by global name, in the order of the forward.
        tied: whether this rank's copies of tied parameters have another copy to be summed with.
        bucket_size: a bucket is closed once it has this many elements; None: never.
        shards: how many equal shards a bucket is divided into; 1: no padding.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.nn.Parameter],
        tied: bool,
        bucket_size: int | None = None,
        shards: int = 1,
    ):
        self.shards = shards
        self.offsets: dict[str, int] = {}
        """Where each parameter begins in the flat buffer."""
        self.buckets: list[Bucket] = []
        self.bucket_of: dict[str, int] = {}
        """The index of each parameter's bucket."""
        self.total = 0
        """Elements of the flat buffer, padding included."""
        open_buckets: dict[tuple[str, ...], list[str]] = {}
        sizes = {name: parameter.numel() for name, parameter in parameters.items()}
        for name in reversed(parameters):
            spec = parameters[name].spec
            is_tied = tied and "pipeline" not in spec.sharded
            summed_over = (*spec.partial, *(("embedding",) if is_tied else ()))
            names = open_buckets.setdefault(summed_over, [])
            names.append(name)
            full = bucket_size is not None and sum(sizes[n] for n in names) >= bucket_size
            if full or is_tied:
                self._close(open_buckets.pop(summed_over), sizes, summed_over)
        for summed_over, names in open_buckets.items():
            self._close(names, sizes, summed_over)

    def _close(
        self, names: Sequence[str], sizes: Mapping[str, int], summed_over: tuple[str, ...]
    ) -> None:
        start = self.total
        alignment = ALIGNMENT if self.shards > 1 else 1
        for name in names:
            self.offsets[name] = self.total
            self.total += _round_up(sizes[name], alignment)
        self.total = start + _round_up(self.total - start, self.shards * alignment)
        self.bucket_of |= dict.fromkeys(names, len(self.buckets))
        self.buckets.append(Bucket(tuple(names), start, self.total, summed_over))

    def ranges_of_shard(self, parameters: Mapping[str, torch.nn.Parameter], index: int) -> dict:
        """{name: (start, stop)}: the range of each parameter's elements, flattened, that lies in
        shard `index` of its bucket. Parameters without any are left out."""
        ranges = {}
        for bucket in self.buckets:
            first, last = bucket.shard(index, self.shards)
            for name in bucket.names:
                offset = self.offsets[name]
                start = max(first - offset, 0)
                stop = min(last - offset, parameters[name].numel())
                if start < stop:
                    ranges[name] = (start, stop)
        return {name: ranges[name] for name in parameters if name in ranges}


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit
