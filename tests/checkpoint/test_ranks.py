"""Checkpoints of several ranks: any cut read in any other, and a failure anywhere is known
everywhere."""

import resource

import pytest
import torch

from megalite.checkpoint.folder import CheckpointError, latest_iteration
from megalite.checkpoint.load import Checkpoint
from megalite.checkpoint.save import write
from megalite.parallel.collectives import barrier
from megalite.parallel.context import ParallelContext
from megalite.parallel.layout import ParallelLayout
from tests.checkpoint.helpers import cut, names_in, part

SHAPE = (10, 12)
LATEST = "latest_checkpointed_iteration.txt"


def numbers(iteration):
    return torch.arange(120, dtype=torch.float64).reshape(SHAPE) + 1000 * iteration


def write_rows(context, root, iteration, holders):
    """Each rank that is in `holders` offers its rows."""
    rows = cut(SHAPE, 0, context.world_size)[context.rank]
    shards = [part("w", numbers(iteration), rows)] if context.rank in holders else []
    private = {"rng": torch.tensor([context.rank], dtype=torch.uint8)}
    return write(root, iteration, shards, private, {"from": context.rank}, "", context.world)


def save_rows_read_columns(launch, root):
    context = ParallelContext.create(ParallelLayout(data=launch.world_size), launch)
    write_rows(context, root, 7, holders=range(context.world_size))
    # Every rank returns from `write` only after the commit: no barrier is needed here.
    with Checkpoint.open(root) as checkpoint:
        box = cut(SHAPE, 1, context.world_size)[context.rank]
        private = checkpoint.private(context.rank, context.world_size)
        return checkpoint.state, checkpoint.read("w", box), private["rng"].item()


@pytest.mark.parametrize("ranks", [3, 4])
def test_rows_are_read_as_columns_by_all_and_whole_by_one(pool, tmp_path, ranks):
    results = pool.run(save_rows_read_columns, ranks, tmp_path)
    assert torch.equal(torch.cat([columns for _, columns, _ in results], dim=1), numbers(7))
    assert [(state, private) for state, _, private in results] == [
        ({"from": 0}, rank) for rank in range(ranks)
    ]
    checkpoint = Checkpoint.open(tmp_path)
    assert torch.equal(checkpoint.read("w"), numbers(7))
    assert checkpoint.private(0, world_size=1) is None
    checkpoint.verify()


def fail_then_succeed(launch, root, fail):
    """A good save, one that `fail` makes fail on rank 1, a good one: (error of the second, latest
    after it)."""
    context = ParallelContext.create(ParallelLayout(data=launch.world_size), launch)
    write_rows(context, root, 1, holders=(0, 1, 2))
    try:
        fail(context, root)
        error = None
    except CheckpointError as caught:
        error = str(caught)
    latest = latest_iteration(root), Checkpoint.open(root).read("w")[0, 0].item()
    barrier(context.world)
    write_rows(context, root, 3, holders=(0, 1, 2))
    return error, latest


def fill_the_disk(context, root):
    """A limit on the size of rank 1's files stands for a full disk: the write fails in the
    middle."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if context.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    try:
        write_rows(context, root, 2, holders=(0, 1, 2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def run_out_of_memory(context, root):
    def shards():
        if context.rank == 1:
            raise MemoryError("too large")
        yield part("w", numbers(2), cut(SHAPE, 0, 3)[context.rank])

    write(root, 2, shards(), {}, {}, "", context.world)


def forget_a_part(context, root):
    write_rows(context, root, 2, holders=(0, 2))


def store_two_copies(context, root):
    rows = cut(SHAPE, 0, 3)
    mine = [rows[context.rank], rows[2]] if context.rank == 1 else [rows[context.rank]]
    write(root, 2, [part("w", numbers(2), box) for box in mine], {}, {}, "", context.world)


def disagree_on_the_dtype(context, root):
    tensor = numbers(2).float() if context.rank == 1 else numbers(2)
    write(root, 2, [part("w", tensor, cut(SHAPE, 0, 3)[context.rank])], {}, {}, "", context.world)


@pytest.mark.parametrize(
    ("fail", "text"),
    [
        (fill_the_disk, "File too large: a file may be no larger than 500 B, which ulimit -f sets"),
        (run_out_of_memory, "rank 1: MemoryError: too large"),
        (forget_a_part, "w: only 72 of the 120 elements"),
        (
            store_two_copies,
            "weights-00001.safetensors and Box(offset=(8, 0), shape=(2, 12)) in "
            "weights-00002.safetensors",
        ),
        (disagree_on_the_dtype, "w: rank 1 says (torch.float32"),
    ],
)
def test_a_failure_on_one_rank_is_raised_on_all_and_commits_nothing(pool, tmp_path, fail, text):
    results = pool.run(fail_then_succeed, 3, tmp_path, fail, timeout=30)
    for error, latest in results:
        assert text in error
        assert latest == (1, 1000.0)
    assert names_in(tmp_path) == ["iter_0000001", "iter_0000003", LATEST]
    assert torch.equal(Checkpoint.open(tmp_path).read("w"), numbers(3))


def prune_and_look(launch, root):
    """What this rank finds once it has saved."""
    context = ParallelContext.create(ParallelLayout(data=launch.world_size), launch)
    rows = cut(SHAPE, 0, context.world_size)[context.rank]
    write(root, 1000, [part("w", numbers(0), rows)], {}, {}, "", context.world, keep_last=1)
    return names_in(root)


def test_all_ranks_wait_until_old_checkpoints_are_deleted(pool, tmp_path):
    """In `write`, where they may wait as long as a disk takes: in the next step it would be taken
    for a hang."""
    for iteration in range(300):
        folder = tmp_path / f"iter_{iteration:07d}"
        folder.mkdir()
        (folder / "index.json").touch()
    assert pool.run(prune_and_look, 2, tmp_path) == [["iter_0001000", LATEST]] * 2
