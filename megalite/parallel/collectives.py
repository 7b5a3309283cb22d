"""Communication: the one place that calls torch.distributed.

Plain collectives over a `Group` first, then point-to-point transfers of the pipeline, then the
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
    """Ranks that talk to each other. `rank` is this process's index in `ranks`, which are global
    ranks."""

    ranks: Sequence[int]
    rank: int
    handle: "dist.ProcessGroup | None" = field(default=None, repr=False)
    """torch's group; None when the group has one rank, and then nothing is ever sent."""
    name: str = ""
    """For messages: tensor, data, pipeline, ..."""
    activity: Activity = field(default_factory=Activity, repr=False)
    """Where calls are noted, so that a hang can be explained; one for all groups of a rank."""
    untimed: bool = False
    """Whether its calls may take long."""

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.ranks)


class _Done:
    """The handle of a collective that had nothing to do."""

    def wait(self) -> None:
        pass


class _Pending:
    """The handle of a call that is under way."""

    def __init__(self, work, call: Call, activity: Activity):
        self._work = work
        self._call = call
        self._activity = activity

    def wait(self) -> None:
        """Return when the result may be used."""
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
    """Record that this rank begins a call of the whole group."""
    return group.activity.record(
        kind, group.name, group.ranks, *_description(tensor), untimed=group.untimed
    )


def _description(tensor: torch.Tensor | None) -> tuple[tuple[int, ...], str]:
    """Shape and dtype of what a call carries."""
    if tensor is None:
        return (), ""
    return tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")


def all_reduce(tensor: torch.Tensor, group: Group, op: str = "sum", async_op: bool = False):
    """Reduce in place over the group ("sum", "max" or "min"). With `async_op` returns a handle to
    `wait()` for."""
    if group.size == 1:
        return DONE
    with group.activity.waits(_call(group, "all_reduce", tensor)) as call:
        work = dist.all_reduce(_contiguous(tensor), _OPS[op], group=group.handle, async_op=async_op)
    return _Pending(work, call, group.activity) if async_op else DONE


def all_gather(tensor: torch.Tensor, group: Group, async_op: bool = False):
    """Concatenate the ranks' equal-shaped tensors along dim 0: [s/t, ...] -> [s, ...].

    With `async_op` returns (result, handle): the result is there once the handle was waited for.
    """
    if group.size == 1:
        return (tensor, DONE) if async_op else tensor
    out = tensor.new_empty((tensor.shape[0] * group.size, *tensor.shape[1:]))
    # dist.all_gather_single is the name from torch 2.13 on; the older one warns there and is all
    # that 2.10-2.12 have.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    with group.activity.waits(_call(group, "all_gather", tensor)) as call:
        work = gather(out, _contiguous(tensor), group=group.handle, async_op=async_op)
    return (out, _Pending(work, call, group.activity)) if async_op else out


def reduce_scatter(tensor: torch.Tensor, group: Group, async_op: bool = False):
    """Sum over the ranks and keep this rank's part of dim 0: [s, ...] -> [s/t, ...].

    With `async_op` returns (result, handle), as `all_gather` does. Raises ValueError when dim 0
    does not divide.
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
    return (out, _Pending(work, call, group.activity)) if async_op else out


def broadcast(tensor: torch.Tensor, group: Group, source: int = 0) -> None:
    """Copy the tensor of the group's rank `source` into everyone's, in place."""
    if group.size > 1:
        with group.activity.waits(_call(group, "broadcast", tensor)):
            dist.broadcast(_contiguous(tensor), group.ranks[source], group=group.handle)


def barrier(group: Group) -> None:
    """Wait until every rank of the group has come here."""
    if group.size > 1:
        with group.activity.waits(_call(group, "barrier")):
            dist.barrier(group=group.handle)


def gather_objects(obj, group: Group) -> list:
    """Every rank's small picklable object, in rank order, on every rank."""
    if group.size == 1:
        return [obj]
    out = [None] * group.size
    with group.activity.waits(_call(group, "gather_objects")):
        dist.all_gather_object(out, obj, group=group.handle)
    return out


@dataclass(frozen=True)
class Transfer:
    """One message of a pipeline: `tensor` goes to, or comes from, the group's rank `peer`."""

    tensor: torch.Tensor
    peer: int
    send: bool


def exchange(transfers: Sequence[Transfer], group: Group) -> list:
    """Post all transfers together, so that opposing ones between a pair cannot block each other;
    returns their handles.

    Neither a sent tensor may be changed nor a received one read before its handle was waited for.
    """
    operations = [
        dist.P2POp(
            dist.isend if t.send else dist.irecv,
            _contiguous(t.tensor),
            group.ranks[t.peer],
            group=group.handle,
        )
        for t in transfers
    ]
    if not operations:
        return []
    calls = [_transfer_call(t, group) for t in transfers]
    with group.activity.waits(calls[0]):
        works = dist.batch_isend_irecv(operations)
    # One handle per transfer, or, where the backend merges them, one for all.
    return [_Pending(work, call, group.activity) for work, call in zip(works, calls)]


def _transfer_call(transfer: Transfer, group: Group) -> Call:
    """Record that this rank begins its end of a transfer."""
    source = group.ranks[group.rank]
    target = group.ranks[transfer.peer]
    if not transfer.send:
        source, target = target, source
    return group.activity.record(
        "transfer", group.name, (source, target), *_description(transfer.tensor)
    )


# Differentiable operators. Each is a forward collective and its transpose in the backward.


class _CopyToTensor(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        # The gradient may be shared with another consumer; reducing in place would change what that
        # one sees.
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
        ctx.group, ctx.partial = group, partial_gradients
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
    """Identity forward, all-reduce of the gradient backward (Megatron-LM's f, Shoeybi et al.
    2019)."""
    return _CopyToTensor.apply(x, group) if group.size > 1 else x


def reduce_from_tensor_region(x: torch.Tensor, group: Group) -> torch.Tensor:
    """All-reduce forward, in place on a contiguous x; identity backward (g, Shoeybi et al.
    2019)."""
    return _ReduceFromTensor.apply(x, group) if group.size > 1 else x


def gather_sequence(x: torch.Tensor, group: Group, partial_gradients: bool = True) -> torch.Tensor:
    """[s/t, b, h] -> [s, b, h]. The backward reduce-scatters (Korthikanti et al. 2022), or takes
    this rank's part when every rank computes the same whole gradient
    (`partial_gradients=False`)."""
    return _GatherSequence.apply(x, group, partial_gradients) if group.size > 1 else x


def reduce_scatter_sequence(x: torch.Tensor, group: Group) -> torch.Tensor:
    """Partial sums [s, b, h] -> [s/t, b, h]; backward all-gathers (Korthikanti et al. 2022)."""
    return _ReduceScatterSequence.apply(x, group) if group.size > 1 else x
