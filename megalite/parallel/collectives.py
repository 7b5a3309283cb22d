"""Communication: the one place that communicates tensors.

First collectives over a `Group`, then point-to-point transfers of the pipeline, then the
differentiable operators of tensor and sequence parallelism. Gathers and scatters go along dim 0,
the sequence of [s, b, h]. With a group of one rank nothing is sent or copied.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from megalite.parallel.activity import Activity, Call


@dataclass(frozen=True, eq=False)
class Group:
    """Ranks that communicate with each other. `rank` is this process's index in `ranks`."""

    ranks: Sequence[int]
    """Global ranks."""
    rank: int
    handle: "dist.ProcessGroup | None" = field(default=None, repr=False)
    """torch's group; None if the group has one rank, since then nothing is sent."""
    name: str = ""
    """For messages: tensor, data, pipeline, ..."""
    activity: Activity = field(default_factory=Activity, repr=False)
    """Records the calls, so that a hang can be explained; one for all groups of a rank."""
    untimed: bool = False
    """Whether its calls may take longer than the time limit of calls."""

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.ranks)

    @property
    def on_gloo(self) -> bool:
        """Whether its collectives run on gloo."""
        return dist.get_backend(self.handle) == "gloo"


class _Done:
    """The handle of a call that is complete."""

    def wait(self) -> None:
        pass


class _Pending:
    """The handle of a call in progress."""

    def __init__(self, work, call: Call, activity: Activity):
        self._work = work
        self._call = call
        self._activity = activity

    def wait(self) -> None:
        """Block until the result may be used."""
        with self._activity.waits(self._call):
            self._work.wait()


DONE = _Done()
_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


def _contiguous(tensor: torch.Tensor) -> torch.Tensor:
    # gloo reduces raw memory: a strided view would be silently wrong.
    if not tensor.is_contiguous():
        shape = tuple(tensor.shape)
        raise ValueError(
            f"a collective needs a contiguous tensor; got shape {shape}, strides {tensor.stride()}"
        )
    return tensor


def _call(group: Group, kind: str, tensor: torch.Tensor | None = None) -> Call:
    """Record that this rank starts a collective call of the group."""
    shape, dtype = _description(tensor)
    return group.activity.record(
        kind, group.name, group.ranks, shape=shape, dtype=dtype, untimed=group.untimed
    )


def _description(tensor: torch.Tensor | None) -> tuple[tuple[int, ...], str]:
    """Shape and dtype of a call's tensor, as they are recorded."""
    if tensor is None:
        return (), ""
    return tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")


def all_reduce(tensor: torch.Tensor, group: Group, op: str = "sum", async_op: bool = False):
    """Reduce in place over the group; `op` is "sum", "max" or "min".

    Returns a handle. With `async_op`, the result may be used after its `wait()`.
    """
    if group.size == 1:
        return DONE
    with group.activity.waits(_call(group, "all_reduce", tensor)) as call:
        work = dist.all_reduce(_contiguous(tensor), _OPS[op], group=group.handle, async_op=async_op)
    if async_op:
        return _Pending(work, call, group.activity)
    return DONE


def all_gather(tensor: torch.Tensor, group: Group, async_op: bool = False):
    """Concatenate the ranks' equal-shaped tensors along dim 0: [s/t, ...] -> [s, ...].

    With `async_op` returns (result, handle); the result may be used after the handle's `wait()`.
    """
    if group.size == 1:
        return (tensor, DONE) if async_op else tensor
    out = tensor.new_empty((tensor.shape[0] * group.size, *tensor.shape[1:]))
    # torch 2.13 renamed all_gather_into_tensor, and warns of the old name; 2.10 to 2.12 have only
    # the old one.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    with group.activity.waits(_call(group, "all_gather", tensor)) as call:
        work = gather(out, _contiguous(tensor), group=group.handle, async_op=async_op)
    if async_op:
        return out, _Pending(work, call, group.activity)
    return out


def reduce_scatter(tensor: torch.Tensor, group: Group, async_op: bool = False):
    """Sum over the ranks and keep this rank's shard of dim 0: [s, ...] -> [s/t, ...].

    With `async_op` returns (result, handle); the result may be used after the handle's `wait()`.
    Raises ValueError if dim 0 is not divisible by the group's size.
    """
    if group.size == 1:
        return (tensor, DONE) if async_op else tensor
    if tensor.shape[0] % group.size:
        raise ValueError(
            f"cannot scatter dim 0 of shape {tuple(tensor.shape)} over {group.size} ranks"
        )
    out = tensor.new_empty((tensor.shape[0] // group.size, *tensor.shape[1:]))
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    with group.activity.waits(_call(group, "reduce_scatter", tensor)) as call:
        work = scatter(out, _contiguous(tensor), group=group.handle, async_op=async_op)
    if async_op:
        return out, _Pending(work, call, group.activity)
    return out


class _ReducingToShard:
    """The handle of a `reduce_to_shard` by all-to-all: the sum is computed when it has arrived."""

    def __init__(self, arriving: _Pending, received: torch.Tensor, shard: torch.Tensor):
        self._arriving = arriving
        self._received = received
        self._shard = shard

    def wait(self) -> None:
        """Block until the shard holds the sum."""
        self._arriving.wait()
        first, *others = self._received
        self._shard.copy_(first)
        for other in others:
            self._shard.add_(other)
        self._received = None


def reduce_to_shard(tensor: torch.Tensor, group: Group):
    """Sum a flat tensor [n] over the ranks, in place and for this rank's shard of it only.

    The rest of the tensor is left undefined. Returns a handle: do not touch the tensor before its
    `wait()`. n must be divisible by the group's size.

    gloo's own reduce-scatter takes several times as long as an all-to-all and a sum from 4 MiB on.
    """
    if group.size == 1:
        return DONE
    shards = _contiguous(tensor).view(group.size, -1)
    own = shards[group.rank]
    kind = "all_to_all" if group.on_gloo else "reduce_scatter"
    with group.activity.waits(_call(group, kind, tensor)) as call:
        if group.on_gloo:
            received = torch.empty_like(shards)
            work = dist.all_to_all_single(
                received.view(-1), tensor, group=group.handle, async_op=True
            )
        else:
            scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
            work = scatter(own, tensor, group=group.handle, async_op=True)
    pending = _Pending(work, call, group.activity)
    return _ReducingToShard(pending, received, own) if group.on_gloo else pending


def gather_shards(tensor: torch.Tensor, group: Group):
    """Fill a flat tensor [n] with every rank's shard of it, in place.

    Returns a handle: do not touch the tensor before its `wait()`. n must be divisible by the
    group's size.
    """
    if group.size == 1:
        return DONE
    own = _contiguous(tensor).view(group.size, -1)[group.rank]
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    with group.activity.waits(_call(group, "all_gather", own)) as call:
        work = gather(tensor, own, group=group.handle, async_op=True)
    return _Pending(work, call, group.activity)


def broadcast(tensor: torch.Tensor, group: Group, source: int = 0) -> None:
    """Copy the tensor of the group's rank `source` into that of every other rank, in place."""
    if group.size > 1:
        with group.activity.waits(_call(group, "broadcast", tensor)):
            dist.broadcast(_contiguous(tensor), group.ranks[source], group=group.handle)


def barrier(group: Group) -> None:
    """Block until every rank of the group has called this."""
    if group.size > 1:
        with group.activity.waits(_call(group, "barrier")):
            dist.barrier(group=group.handle)


def gather_objects(obj, group: Group) -> list:
    """Gather each rank's picklable object: a list in rank order, on every rank. For small ones."""
    if group.size == 1:
        return [obj]
    out = [None] * group.size
    with group.activity.waits(_call(group, "gather_objects")):
        dist.all_gather_object(out, obj, group=group.handle)
    return out


@dataclass(frozen=True)
class Transfer:
    """One point-to-point message of a pipeline."""

    tensor: torch.Tensor
    """Contiguous: what is sent, or the buffer to receive into."""
    peer: int
    """Index in the group of the rank at the other end."""
    send: bool
    """True to send, False to receive."""


def exchange(transfers: Sequence[Transfer], group: Group) -> list:
    """Start all transfers together and return their handles.

    Started together, a send and a receive between the same two ranks cannot block each other. Do
    not change a sent tensor or read a received one before the handle's `wait()`.
    """
    if not transfers:
        return []
    operations = []
    for transfer in transfers:
        operation = dist.isend if transfer.send else dist.irecv
        tensor = _contiguous(transfer.tensor)
        peer = group.ranks[transfer.peer]
        operations.append(dist.P2POp(operation, tensor, peer, group=group.handle))
    calls = [_transfer_call(transfer, group) for transfer in transfers]
    with group.activity.waits(calls[0]):
        works = dist.batch_isend_irecv(operations)
    # One handle for each transfer, or one for all if the backend merges them.
    return [_Pending(work, call, group.activity) for work, call in zip(works, calls)]


def _transfer_call(transfer: Transfer, group: Group) -> Call:
    """Record that this rank starts its end of a transfer."""
    ends = (group.ranks[group.rank], group.ranks[transfer.peer])
    if not transfer.send:
        ends = ends[::-1]
    shape, dtype = _description(transfer.tensor)
    return group.activity.record("transfer", group.name, ends, shape=shape, dtype=dtype)


# Differentiable operators. Each is a forward collective and its transpose in the backward.


class _CopyToTensor(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        # Not in place: another consumer may share the gradient.
        total = grad.clone(memory_format=torch.contiguous_format)
        all_reduce(total, ctx.group)
        return total, None


class _ReduceFromTensor(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.mark_dirty(x)
        all_reduce(x, group)
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group, partial_gradients):
        ctx.group = group
        ctx.partial = partial_gradients
        return all_gather(x.contiguous(), group)

    @staticmethod
    def backward(ctx, grad):
        if ctx.partial:
            return reduce_scatter(grad.contiguous(), ctx.group), None, None
        return grad.chunk(ctx.group.size)[ctx.group.rank].contiguous(), None, None


class _ReduceScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return reduce_scatter(x.contiguous(), group)

    @staticmethod
    def backward(ctx, grad):
        return all_gather(grad.contiguous(), ctx.group), None


def copy_to_tensor_region(x: torch.Tensor, group: Group) -> torch.Tensor:
    """Identity forward, all-reduce of the gradient backward: f of Shoeybi et al. 2019."""
    if group.size == 1:
        return x
    return _CopyToTensor.apply(x, group)


def reduce_from_tensor_region(x: torch.Tensor, group: Group) -> torch.Tensor:
    """All-reduce forward, in place on a contiguous x; identity backward.

    It is g of Shoeybi et al. 2019.
    """
    if group.size == 1:
        return x
    return _ReduceFromTensor.apply(x, group)


def gather_sequence(x: torch.Tensor, group: Group, partial_gradients: bool = True) -> torch.Tensor:
    """All-gather of the sequence: [s/t, b, h] -> [s, b, h] (Korthikanti et al. 2022).

    If each rank computes a partial sum of the gradient, the backward reduce-scatters it. With
    `partial_gradients=False` every rank computes the whole gradient, and the backward takes this
    rank's shard of it.
    """
    if group.size == 1:
        return x
    return _GatherSequence.apply(x, group, partial_gradients)


def reduce_scatter_sequence(x: torch.Tensor, group: Group) -> torch.Tensor:
    """Reduce-scatter of partial sums: [s, b, h] -> [s/t, b, h] (Korthikanti et al. 2022).

    The backward all-gathers.
    """
    if group.size == 1:
        return x
    return _ReduceScatterSequence.apply(x, group)
