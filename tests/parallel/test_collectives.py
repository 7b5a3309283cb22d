"""Collectives, transfers and the differentiable operators, on real gloo ranks."""

import ast
from pathlib import Path

import pytest
import torch

import megalite
from megalite.parallel import collectives
from megalite.parallel.collectives import (
    EXCHANGED_BYTES,
    Group,
    all_gather,
    all_reduce,
    barrier,
    broadcast,
    gather_objects,
    gather_objects_to_first,
    gather_sequence,
    receive,
    reduce_from_tensor_region,
    reduce_scatter,
    reduce_scatter_sequence,
    send,
)
from megalite.parallel.context import ParallelContext
from megalite.parallel.layout import ParallelLayout

ALONE = Group((0,), 0)


def tensor_group(launch) -> Group:
    return ParallelContext.create(
        ParallelLayout(tensor=launch.world_size), launch, timeout_minutes=0.3
    ).tensor


def plain_collectives(launch):
    """Each collective, waited for at once and later, on [4, 2] of 10 * rank + element."""
    group = tensor_group(launch)
    mine = torch.arange(8.0).view(4, 2) + 10 * launch.rank
    results = {}
    for op in ("sum", "max", "min"):
        results[op] = mine.clone()
        all_reduce(results[op], group, op)
    later = mine.clone()
    all_reduce(later, group, async_op=True).wait()
    large = torch.full((EXCHANGED_BYTES // 4 + 1,), 10.0 + launch.rank)
    all_reduce(large, group)
    gathered, gathering = all_gather(mine, group, async_op=True)
    scattered, scattering = reduce_scatter(mine, group, async_op=True)
    gathering.wait()
    scattering.wait()
    sent = mine.clone()
    broadcast(sent, group, source=1)
    barrier(group)
    return results | {
        "later": later,
        "large": large.unique(),
        "gather": all_gather(mine, group),
        "gather later": gathered,
        "scatter": reduce_scatter(mine, group),
        "scatter later": scattered,
        "broadcast": sent,
        "objects": gather_objects({"rank": launch.rank}, group),
        "objects of all": gather_objects_to_first("x" * launch.rank, group),
    }


@pytest.mark.parametrize("size", [2, 4])
def test_values(pool, size):
    everyone = [torch.arange(8.0).view(4, 2) + 10 * rank for rank in range(size)]
    total = sum(everyone)
    for rank, got in enumerate(pool.run(plain_collectives, size)):
        expected = {
            "sum": total,
            "later": total,
            "large": torch.tensor([10.0 * size + sum(range(size))]),
            "max": everyone[-1],
            "min": everyone[0],
            "broadcast": everyone[1],
            "gather": torch.cat(everyone),
            "gather later": torch.cat(everyone),
            "scatter": total.chunk(size)[rank],
            "scatter later": total.chunk(size)[rank],
        }
        assert got.pop("objects") == [{"rank": r} for r in range(size)]
        of_all = ["x" * r for r in range(size)] if rank == 0 else []
        assert got.pop("objects of all") == of_all
        assert {name: value.tolist() for name, value in got.items()} == {
            k: v.tolist() for k, v in expected.items()
        }


def products(launch):
    """For each operator A, this rank's parts of <A x, y> and <x, A^T y>, A^T as autograd has it."""
    group = tensor_group(launch)
    alike = torch.Generator().manual_seed(0)
    own = torch.Generator().manual_seed(1 + launch.rank)

    def draw(length, generator):
        return torch.randn(length, 2, 3, dtype=torch.float64, generator=generator)

    def both(operator, x, y):
        x.requires_grad_()
        # A copy first: operators may work in place on what another operation made.
        output = operator(x.clone(), group)
        output.backward(y)
        return (output * y).sum().item(), (x * x.grad).sum().item()

    whole, part = 8, 8 // group.size
    return {
        # The output is the same on all ranks, and so is y.
        "reduce": both(reduce_from_tensor_region, draw(whole, own), draw(whole, alike)),
        "gather": both(gather_sequence, draw(part, own), draw(whole, own)),
        "gather, same gradient": both(
            lambda x, group: gather_sequence(x, group, partial_gradients=False),
            draw(part, own),
            draw(whole, alike),
        ),
        "reduce-scatter": both(reduce_scatter_sequence, draw(whole, own), draw(part, own)),
    }


@pytest.mark.parametrize("size", [2, 4])
def test_backward_is_the_transpose_of_forward(pool, size):
    """<A x, y> = <x, A^T y>. A tensor that all ranks hold alike is one vector, not one for each
    rank."""
    results = pool.run(products, size)
    for name in results[0]:
        left = [result[name][0] for result in results]
        right = [result[name][1] for result in results]
        if name in ("reduce", "gather, same gradient"):
            left = left[:1]
        assert sum(left) == pytest.approx(sum(right), rel=1e-12), name


def refused(launch):
    """The message of each collective that is given a transposed view, or rows that do not
    divide."""
    group = tensor_group(launch)
    strided = torch.ones(2, 4).t()
    calls = {
        "all_reduce": lambda: all_reduce(strided, group),
        "all_gather": lambda: all_gather(strided, group),
        "reduce_scatter": lambda: reduce_scatter(strided, group),
        "broadcast": lambda: broadcast(strided, group),
        "send": lambda: send(strided, 1 - group.rank, group),
        "receive": lambda: receive(strided, 1 - group.rank, group),
        "reduce_from": lambda: reduce_from_tensor_region(strided, group),
        "uneven": lambda: reduce_scatter(torch.ones(3, 2), group),
    }
    messages = {}
    for name, call in calls.items():
        try:
            messages[name] = f"no error but {call()}"
        except ValueError as error:
            messages[name] = str(error)
    return messages


def test_a_strided_tensor_is_refused(pool):
    """gloo would reduce its raw memory, silently."""
    messages = pool.run(refused, 2)[0]
    assert messages.pop("uneven") == "cannot scatter dim 0 of shape (3, 2) over 2 ranks"
    wanted = "a collective needs a contiguous tensor; got shape (4, 2), strides (1, 4)"
    assert messages == dict.fromkeys(messages, wanted)


def opposing(launch):
    """Every rank sends two messages to both neighbours on a ring and receives as many, all posted
    at once."""
    group = tensor_group(launch)
    size, rank = group.size, group.rank
    neighbours = sorted({(rank - 1) % size, (rank + 1) % size})
    handles = []
    for i in range(2):
        for peer in neighbours:
            handles.append(send(torch.full((1000,), 100.0 * rank + i), peer, group))
    arriving = {(peer, i): torch.empty(1000) for i in range(2) for peer in neighbours}
    for (peer, _), tensor in arriving.items():
        handles.append(receive(tensor, peer, group))
    for handle in handles:
        handle.wait()
    return {key: tensor.unique().tolist() for key, tensor in arriving.items()}


@pytest.mark.parametrize("size", [2, 4])
def test_opposing_messages_do_not_wait_for_each_other(pool, size):
    for result in pool.run(opposing, size):
        assert result == {(peer, i): [100.0 * peer + i] for peer, i in result}


def test_a_group_of_one_rank_sends_and_copies_nothing():
    x = torch.arange(6.0).view(2, 3).t()  # strided, which is no matter here
    assert all_gather(x, ALONE) is x and reduce_scatter(x, ALONE) is x
    for collective in (all_gather, reduce_scatter):
        result, handle = collective(x, ALONE, async_op=True)
        handle.wait()
        assert result is x
    for operator in (reduce_from_tensor_region, gather_sequence, reduce_scatter_sequence):
        assert operator(x, ALONE) is x
    all_reduce(x, ALONE, async_op=True).wait()
    broadcast(x, ALONE)
    barrier(ALONE)
    assert gather_objects("x", ALONE) == ["x"]
    assert gather_objects_to_first("x", ALONE) == ["x"]
    assert x.tolist() == [[0, 3], [1, 4], [2, 5]]


def names_torch_distributed(tree: ast.AST) -> bool:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = any(alias.name.startswith("torch.distributed") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found = any(name.startswith("torch.distributed") for name in names)
        else:
            found = isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed"
        if found:
            return True
    return False


def test_torch_distributed_is_called_from_one_place():
    package = Path(megalite.__file__).parent
    users = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if names_torch_distributed(ast.parse(path.read_text()))
    }
    files = ["collectives", "context", "rendezvous"]
    assert users == {f"parallel/{file}.py" for file in files}
    assert Path(collectives.__file__).parent == package / "parallel"


def test_the_search_for_torch_distributed_finds_every_form():
    for source in (
        "import torch.distributed as dist",
        "from torch import distributed",
        "from torch.distributed.tensor import DTensor",
        "x = torch.distributed.get_rank()",
    ):
        assert names_torch_distributed(ast.parse(source))
    assert not names_torch_distributed(
        ast.parse("import torch\nfrom torch import nn\ntorch.distributions.Normal")
    )
