"""The gradient buffer: one flat tensor that gradients accumulate in, are summed over ranks in, and
are clipped in."""

import weakref
from collections.abc import Iterator

import torch
from torch.nn import Parameter

from megalite.nn.parameter import held_boxes
from megalite.nn.weight_gradient import WeightGradients
from megalite.optim.buckets import Bucket, BucketLayout
from megalite.parallel.boxes import Box
from megalite.parallel.collectives import Group, all_reduce, reduce_to_shard
from megalite.parallel.config import ParallelConfig
from megalite.parallel.context import ParallelContext


class GradientBuffer:
    """A flat buffer, fp32 (fp64 for fp64 models), of which every parameter's `main_grad` is a view.

    After `reduce`, the whole buffer holds sums over all ranks. If it is sharded (ZeRO stage 1,
    Rajbhandari et al. 2020), only this rank's shard of each bucket does.

    Args:
        parameters: of one model, by global name.
        context: of this rank.
        config: whether each data rank needs the sums of its own shard only, whether a bucket's
            reduction starts as soon as the last backward has completed it, and the size of buckets.
    """

    def __init__(
        self, parameters: dict[str, Parameter], context: ParallelContext, config: ParallelConfig
    ):
        self.context = context
        self.parameters = parameters
        size = context.data.size
        self.sharded = config.use_distributed_optimizer and size > 1
        self.overlap = config.overlap_grad_reduce and size > 1
        # Without a use for parts of the buffer, one bucket: one reduction of everything.
        in_buckets = config.use_distributed_optimizer or config.overlap_grad_reduce
        bucket_size = config.bucket_size(size) if in_buckets else None
        tied = context.embedding is not None
        shards = size if self.sharded else 1
        self.layout = BucketLayout(parameters, tied, bucket_size, shards=shards)
        self.shard_index = context.data.rank if self.sharded else 0
        self.ranges: dict[str, tuple[int, int]] = self.layout.ranges_of_shard(
            parameters, self.shard_index
        )
        """(start, stop) of each parameter's flattened elements that this rank updates."""
        position = context.shard_coordinates if self.sharded else context.coordinates
        self.counted = [n for n in self.ranges if parameters[n].spec.is_primary(position)]
        """Parameters of which this rank has the one copy that counts in sums over the model. Data
        ranks of a sharded buffer have no copies, but different shards."""
        dtypes = {parameter.dtype for parameter in parameters.values()}
        dtype = torch.float64 if torch.float64 in dtypes else torch.float32
        self.flat = torch.zeros(self.layout.total, dtype=dtype, device=context.device)
        # The hooks of parameters must not keep the buffer alive, and with it the groups: torch
        # holds them where Python's collector of reference cycles does not look.
        complete = weakref.WeakMethod(self._complete)
        self.weight_gradients = WeightGradients(
            (lambda parameter: complete()(parameter)) if self.overlap else None
        )
        for name, parameter in parameters.items():
            self.weight_gradients.attach(parameter, self.view(name, self.flat))

        # The state of the overlapped reductions of one step.
        self._contributions_left: dict[str, int] = {}
        """Of each parameter: backwards that will still add to its gradient; empty between steps."""
        self._incomplete: list[int] = []
        """Of each bucket: parameters whose gradient is not complete."""
        self._reducing: list = []
        """Handles of the buckets whose reduction has started: always the first ones, so that all
        data ranks start them in the same order."""

    def view(self, name: str, flat: torch.Tensor) -> torch.Tensor:
        """The parameter's view of a buffer that is laid out like this one."""
        parameter = self.parameters[name]
        offset = self.layout.offsets[name]
        return flat[offset : offset + parameter.numel()].view(parameter.shape)

    def updated_gradient(self, name: str) -> torch.Tensor:
        """The gradient of what this rank updates of a parameter: all of it, in its shape, or a flat
        range of it."""
        return self.updated_part(name, self.parameters[name].main_grad)

    def updated_part(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The part of a tensor of the parameter's shape that this rank updates, as
        `updated_gradient` has it."""
        if not self.sharded:
            return tensor
        start, stop = self.ranges[name]
        return tensor.view(-1)[start:stop]

    def held(self) -> Iterator[tuple[str, Box, torch.Tensor]]:
        """(parameter, box of its global tensor, view of its gradient) for all that this rank has
        the sums of after `reduce`, vocabulary padding left out."""
        for name, elements in self.ranges.items():
            for box, values in held_boxes(
                self.parameters[name], self.updated_gradient(name), elements
            ):
                yield name, box, values

    # One step: zero, the backwards, reduce, norm, clip -----------------------------------------

    def zero(self) -> None:
        """Forget all gradients, before the first backward of a step."""
        self.flat.zero_()
        self._contributions_left = {}
        self._reducing = []

    def begin_step(self, microbatches: int) -> None:
        """A parameter's gradient is complete, and may be reduced, when the backwards of this many
        microbatches have added to it: on both stages that use it, where this rank holds both ends
        of a model with a tied embedding."""
        if not self.overlap:
            return
        both_ends = self.context.pipeline.size > 1 and self.context.embedding is None
        for name, parameter in self.parameters.items():
            is_shared = both_ends and "pipeline" not in parameter.spec.sharded
            self._contributions_left[name] = microbatches * (2 if is_shared else 1)
        self._incomplete = [len(bucket.names) for bucket in self.layout.buckets]

    def _complete(self, parameter: Parameter) -> None:
        name = parameter.spec.name
        left = self._contributions_left
        if name not in left:
            return
        left[name] -= 1
        if left[name]:
            return
        self._incomplete[self.layout.bucket_of[name]] -= 1
        while len(self._reducing) < len(self._incomplete):
            if self._incomplete[len(self._reducing)]:
                break
            self._start_next()

    def _start_next(self) -> None:
        bucket = self.layout.buckets[len(self._reducing)]
        values = self.flat[bucket.start : bucket.stop]
        if self.sharded:
            self._reducing.append(reduce_to_shard(values, self.context.data))
        else:
            self._reducing.append(all_reduce(values, self.context.data, async_op=True))

    def reduce(self) -> None:
        """Sum what ranks hold parts of, after the last backward of a step. Collective over all
        ranks.

        First over the data ranks. Then over the axes that a parameter's gradient is partial over,
        what each rank computed from its part of the sequence; and over first and last stage, the
        two copies of a tied embedding. The copies come last, so that they are equal bit for bit
        though the data ranks of the two stages sum different buffers.
        """
        self._contributions_left = {}
        # By the flags alone: all data ranks must call the same, whatever their backwards reached.
        if not self.sharded and not self.overlap:
            all_reduce(self.flat, self.context.data)
        else:
            while len(self._reducing) < len(self.layout.buckets):
                self._start_next()
            for handle in self._reducing:
                handle.wait()
            self._reducing = []
        for bucket in self.layout.buckets:
            for group in self._groups(bucket):
                all_reduce(self._own_shard(bucket), group)

    def _own_shard(self, bucket: Bucket) -> torch.Tensor:
        """What this rank has the sums of in a bucket: all of it, or its shard."""
        first, last = bucket.shard(self.shard_index, self.layout.shards)
        return self.flat[first:last]

    def _groups(self, bucket: Bucket) -> list[Group]:
        """Whom a bucket is summed with, beside the data ranks."""
        axes = [axis for axis in bucket.summed_over if axis != "embedding"]
        groups = [self.context.group(*axes)] if axes else []
        if "embedding" in bucket.summed_over:
            groups.append(self.context.embedding)
        return groups

    def norm(self) -> float:
        """Global L2 norm of the whole model's gradient, each parameter counted once; the same on
        every rank. Rows of vocabulary padding add nothing: no token reads them and their logits
        are left out of the loss, so their gradients are 0."""
        squares = torch.zeros((), dtype=torch.float64, device=self.flat.device)
        for name in self.counted:
            squares += torch.linalg.vector_norm(self.updated_gradient(name)).double() ** 2
        all_reduce(squares, self.context.world)
        return squares.sqrt().item()

    def clip(self, norm: float, max_norm: float, loss_scale: float = 1.0) -> None:
        """Scale all gradients by min(1, max_norm / (norm + 1e-6)) (Pascanu et al. 2013), max_norm 0
        = off, and undo the scale of the loss, which `norm` is without."""
        factor = 1.0
        if max_norm > 0:
            factor = min(1.0, max_norm / (norm + 1e-6))
        factor /= loss_scale
        if factor != 1:
            for bucket in self.layout.buckets:
                self._own_shard(bucket).mul_(factor)
