"""Communication: the one place that communicates tensors.

First collectives over a `Group`, then point-to-point transfers of the pipeline, then the
differentiable operators of tensor and sequence parallelism. Gathers and scatters go along dim 0,
the sequence of [s, b, h]. With a group of one rank nothing is sent or copied.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

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
# torch 2.13 renamed these two, and warns of the old names; 2.10 to 2.12 have only those.
_ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
EXCHANGED_BYTES = 4 * 2**20
"""Up to this size two ranks on gloo sum a tensor by sending it to each other whole, which is faster
than its all-reduce up to about 2 MiB, and as fast at 4 (benchmarks/collectives.py)."""
_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


def _contiguous(tensor: torch.Tensor) -> torch.Tensor:
    # gloo reduces raw memory: a strided view would be silently wrong.
    if not tensor.is_contiguous():
        shape = tuple(tensor.shape)
        raise ValueError(
            f"a collective needs a contiguous tensor; got shape {shape}, strides {tensor.stride()}"
        )
    return tensor


def _content(tensor: torch.Tensor) -> dict:
    """Shape, dtype and bytes of a call's tensor, as they are recorded."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {"shape": tuple(tensor.shape), "dtype": dtype, "bytes": tensor.nbytes}


def _post(kind: str, group: Group, collective: Callable, *tensors: torch.Tensor, **options):
    """Call one of torch's collectives on its output and input, or the one tensor that is both.
    Returns a handle.

    It is recorded with the shape of its input, and the bytes of the whole tensor: of a gather those
    of the output.
    """
    content = _content(tensors[-1]) if tensors else {}
    if kind == "all_gather":
        content["bytes"] = tensors[0].nbytes
    activity = group.activity
    call = activity.record(kind, group.name, group.ranks, **content, untimed=group.untimed)
    with activity.waits(call):
        work = collective(*map(_contiguous, tensors), group=group.handle, **options)
    return DONE if work is None else _Pending(work, call, activity)


def all_reduce(tensor: torch.Tensor, group: Group, op: str = "sum", async_op: bool = False):
    """Reduce in place over the group; `op` is "sum", "max" or "min".

    Returns a handle in either case. With `async_op`, the result may be used after its `wait()`.
    """
    if group.size == 1:
        return DONE
    if op == "sum" and group.size == 2 and tensor.nbytes <= EXCHANGED_BYTES and group.on_gloo:
        handle = _exchange_sum(tensor, group)
        if not async_op:
            handle.wait()
        return handle
    return _post("all_reduce", group, dist.all_reduce, tensor, op=_OPS[op], async_op=async_op)


class _Arriving:
    """The handle of a call whose result is computed from what has arrived."""

    def __init__(self, pending: _Pending, finish: Callable[[], None]):
        self._pending = pending
        self._finish: Callable[[], None] | None = finish

    def wait(self) -> None:
        """Block until the result may be used."""
        if self._finish is not None:
            self._pending.wait()
            self._finish()
            self._finish = None  # and what it holds


def _exchange_sum(tensor: torch.Tensor, group: Group):
    """Sum a tensor over two ranks that send it to each other whole. Returns a handle.

    That is as many bytes as gloo's ring sends, in one step in place of two. a + b = b + a: both
    ranks compute the same sum.
    """
    tensor = torch.atleast_1d(tensor)
    received = torch.empty_like(tensor)
    lengths = [len(tensor), len(tensor)]
    lengths[group.rank] = 0
    exchange = partial(
        dist.all_to_all_single, input_split_sizes=lengths, output_split_sizes=lengths
    )
    arriving = _post("all_reduce", group, exchange, received, tensor, async_op=True)
    return _Arriving(arriving, lambda: tensor.add_(received))


def all_gather(tensor: torch.Tensor, group: Group, async_op: bool = False):
    """Concatenate the ranks' equal-shaped tensors along dim 0: [s/t, ...] -> [s, ...].

    Returns the result, a tensor; with `async_op` the pair (result, handle), of which the result may
    be used after the handle's `wait()`.
    """
    if group.size == 1:
        return (tensor, DONE) if async_op else tensor
    out = tensor.new_empty((tensor.shape[0] * group.size, *tensor.shape[1:]))
    handle = _post("all_gather", group, _ALL_GATHER, out, tensor, async_op=async_op)
    return (out, handle) if async_op else out


def _sum_shards(tensor: torch.Tensor, shard: torch.Tensor, group: Group):
    """Sum a tensor over the ranks into `shard`, as this rank's part of dim 0. Returns a handle.

    gloo's own reduce-scatter takes longer than an all-to-all and a sum, which is also in the order
    of the ranks (benchmarks/collectives.py).
    """
    if not group.on_gloo:
        return _post("reduce_scatter", group, _REDUCE_SCATTER, shard, tensor, async_op=True)
    received = torch.empty_like(tensor)
    post = partial(_post, "all_to_all", group, dist.all_to_all_single, async_op=True)
    arriving = post(received, tensor)

    def add_up() -> None:
        first, second, *others = received.view(group.size, *shard.shape)
        torch.add(first, second, out=shard)
        for other in others:
            shard.add_(other)

    return _Arriving(arriving, add_up)


def reduce_scatter(tensor: torch.Tensor, group: Group, async_op: bool = False):
    """Sum over the ranks and keep this rank's shard of dim 0: [s, ...] -> [s/t, ...].

    Returns the result, a tensor; with `async_op` the pair (result, handle), of which the result may
    be used after the handle's `wait()`. On gloo it is an all-to-all and a sum.
    Raises ValueError if dim 0 is not divisible by the group's size.
    """
    if group.size == 1:
        return (tensor, DONE) if async_op else tensor
    if tensor.shape[0] % group.size:
        raise ValueError(
            f"cannot scatter dim 0 of shape {tuple(tensor.shape)} over {group.size} ranks"
        )
    out = tensor.new_empty((tensor.shape[0] // group.size, *tensor.shape[1:]))
    handle = _sum_shards(tensor, out, group)
    if async_op:
        return out, handle
    handle.wait()
    return out


def reduce_to_shard(tensor: torch.Tensor, group: Group):
    """Sum a flat tensor [n] over the ranks, in place and for this rank's shard of it only.

    The rest of the tensor is left undefined. Returns a handle: do not touch the tensor before its
    `wait()`. n must be divisible by the group's size. On gloo it is an all-to-all and a sum.
    """
    if group.size == 1:
        return DONE
    own = _contiguous(tensor).view(group.size, -1)[group.rank]
    return _sum_shards(tensor, own, group)


def gather_shards(tensor: torch.Tensor, group: Group):
    """Fill a flat tensor [n] with every rank's shard of it, in place.

    Returns a handle: do not touch the tensor before its `wait()`. n must be divisible by the
    group's size.
    """
    if group.size == 1:
        return DONE
    own = _contiguous(tensor).view(group.size, -1)[group.rank]
    return _post("all_gather", group, _ALL_GATHER, tensor, own, async_op=True)


def all_to_all(
    parts: Sequence[torch.Tensor], sizes: Sequence[int], group: Group
) -> list[torch.Tensor]:
    """Send `parts[i]`, flat, to the group's rank i. Returns what each rank sent to this one.

    parts: one for each rank, of one dtype; they may be empty.
    sizes: numbers of elements that the ranks send to this one.
    """
    if group.size == 1:
        return list(parts)
    sent = torch.cat(list(parts))
    received = sent.new_empty(sum(sizes))
    splits = {
        "output_split_sizes": list(sizes),
        "input_split_sizes": [part.numel() for part in parts],
    }
    _post("all_to_all", group, dist.all_to_all_single, received, sent, **splits)
    return list(received.split(list(sizes)))


def broadcast(tensor: torch.Tensor, group: Group, source: int = 0) -> None:
    """Copy the tensor of the group's rank `source` into that of every other rank, in place."""
    if group.size > 1:
        _post("broadcast", group, dist.broadcast, tensor, src=group.ranks[source])


def barrier(group: Group) -> None:
    """Block until every rank of the group has called this."""
    if group.size > 1:
        _post("barrier", group, dist.barrier)


def gather_objects(obj, group: Group) -> list:
    """Gather each rank's picklable object: a list in rank order, on every rank. For small ones."""
    out = [obj] * group.size
    if group.size > 1:
        _post("gather_objects", group, partial(dist.all_gather_object, out, obj))
    return out


def gather_objects_to_first(obj, group: Group) -> list:
    """Gather each rank's picklable object on the group's first rank: a list in rank order there,
    an empty one elsewhere."""
    if group.size == 1:
        return [obj]
    out = [None] * group.size if group.rank == 0 else None
    gather = partial(dist.gather_object, obj, out, dst=group.ranks[0])
    _post("gather_objects_to_first", group, gather)
    return out or []


def send(tensor: torch.Tensor, target: int, group: Group):
    """Send a contiguous tensor to the group's rank `target`. Returns a handle: do not change the
    tensor before its `wait()`."""
    ends = (group.ranks[group.rank], group.ranks[target])
    return _transfer(dist.isend, tensor, group, ends=ends, peer=ends[1])


def receive(tensor: torch.Tensor, source: int, group: Group):
    """Fill a contiguous tensor with what the group's rank `source` sends. Returns a handle: do not
    read the tensor before its `wait()`.

    What is sent between two ranks arrives in the order in which it is sent.
    """
    ends = (group.ranks[source], group.ranks[group.rank])
    return _transfer(dist.irecv, tensor, group, ends=ends, peer=ends[0])


def _transfer(
    operation: Callable, tensor: torch.Tensor, group: Group, *, ends: tuple[int, int], peer: int
) -> _Pending:
    """Start a transfer, which both its ends record from sender to receiver: so they count the same
    ones."""
    activity = group.activity
    content = _content(_contiguous(tensor))
    call = activity.record("transfer", group.name, ends, **content, untimed=group.untimed)
    with activity.waits(call):
        work = operation(tensor, peer, group=group.handle)
    return _Pending(work, call, activity)


# Differentiable operators. Each is a forward collective and its transpose in the backward.


class _ReduceFromTensor(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.mark_dirty(x)
        all_reduce(x, group)
        return x

    @staticmethod
    def backward(ctx, grad):
        # Every rank has the whole gradient of the sum, and it is that of its own term.
        return grad, None


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group, partial_gradients):
        ctx.group = group
        ctx.partial = partial_gradients
        return all_gather(x.contiguous(), group)

    @staticmethod
    def backward(ctx, grad):
        # Either sums what the ranks computed, or takes this rank's part of what all computed alike.
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
