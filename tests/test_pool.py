"""The rank pool: what it returns, what it says about real failures, and that it works again after
each."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from tests.pool import RanksFailed


def join(launch) -> None:
    """Make this rank part of a gloo world."""
    dist.init_process_group(
        "gloo", init_method=launch.init_method, rank=launch.rank, world_size=launch.world_size
    )


def sum_of_ranks(launch, factor):
    join(launch)
    total = torch.tensor([float(launch.rank * factor)])
    dist.all_reduce(total)
    return launch, total


def report_state(launch):
    return {
        "pid": os.getpid(),
        "group": dist.is_initialized(),
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "grad": torch.is_grad_enabled(),
        "random": torch.rand(3).tolist(),
        "omp": os.environ["OMP_NUM_THREADS"],
        "variable": os.environ.get("LEFT_BEHIND"),
        "folder": os.getcwd(),
    }


def leave_everything_changed(launch):
    join(launch)
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(2)
    torch.set_grad_enabled(False)
    torch.manual_seed(launch.rank + 100)
    os.environ["LEFT_BEHIND"] = "yes"
    os.chdir("/")


def raise_on_rank_2(launch):
    join(launch)
    if launch.rank == 2:
        raise KeyError("the cause")
    dist.all_reduce(torch.ones(4))


def raise_and_leave_the_group(launch):
    """The failing rank leaves its group first, so that its peers' connections break before it
    reports."""
    join(launch)
    try:
        if launch.rank == 2:
            raise KeyError("the cause")
        dist.all_reduce(torch.ones(4))
    finally:
        dist.destroy_process_group()
        time.sleep(0.2 if launch.rank == 2 else 0)


def die_on_rank_1(launch, how):
    join(launch)
    if launch.rank == 1:
        os._exit(7) if how == "exit" else os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.ones(4))


def sleep_through_the_collective(launch):
    join(launch)
    if launch.rank == 1:
        oversleep()
    if launch.rank < 3:
        dist.all_reduce(torch.ones(4))


def oversleep():
    time.sleep(1000)


def abort_on_rank_1(launch):
    if launch.rank == 1:
        os.abort()


def return_what_cannot_travel(launch):
    return lambda: None


def assert_works(pool) -> None:
    """The next run is as good as the first."""
    assert [total.item() for _, total in pool.run(sum_of_ranks, 4, 10, timeout=20)] == [60.0] * 4


def test_results_come_by_rank(pool):
    for world_size in (1, 4, 8, 2):
        results = pool.run(sum_of_ranks, world_size, 10)
        assert [launch.rank for launch, _ in results] == list(range(world_size))
        assert {launch.world_size for launch, _ in results} == {world_size}
        assert [total.item() for _, total in results] == [
            10.0 * sum(range(world_size))
        ] * world_size


def test_nothing_remains_from_an_earlier_call(pool):
    before = pool.run(report_state, 2)
    pool.run(leave_everything_changed, 2)
    assert pool.run(report_state, 2) == before
    assert before[0] | {"pid": 0} == {
        "pid": 0,
        "group": False,
        "dtype": torch.float32,
        "threads": 1,
        "grad": True,
        "random": before[1]["random"],
        "omp": "1",
        "variable": None,
        "folder": os.getcwd(),
    }


@pytest.mark.parametrize("function", [raise_on_rank_2, raise_and_leave_the_group])
def test_a_rank_that_raises_is_named_first(pool, function):
    with pytest.raises(RanksFailed, match="rank 2 raised KeyError: 'the cause'") as failed:
        pool.run(function, 3, timeout=20)
    message = str(failed.value)
    assert failed.value.ranks[0] == 2
    assert message.startswith(f"tests.test_pool.{function.__name__} on 3 ranks:\n  rank 2 raised")
    assert message.index('raise KeyError("the cause")') < message.index("--- rank 0")
    assert "/pool.py" not in message
    assert_works(pool)


@pytest.mark.parametrize(
    "how, said", [("exit", "exited with status 7"), ("kill", "was killed by SIGKILL")]
)
def test_a_rank_that_dies_is_named_first(pool, how, said):
    with pytest.raises(RanksFailed, match=f"rank 1 {said}") as failed:
        pool.run(die_on_rank_1, 3, how, timeout=20)
    assert failed.value.ranks[0] == 1
    assert_works(pool)


def test_a_rank_that_aborts_shows_its_stack(pool):
    with pytest.raises(RanksFailed, match="rank 1 was killed by SIGABRT") as failed:
        pool.run(abort_on_rank_1, 2)
    assert failed.value.ranks == [1]
    assert "in abort_on_rank_1" in str(failed.value) and "finished: ranks [0]" in str(failed.value)
    assert_works(pool)


def test_a_hang_shows_who_is_waited_for(pool):
    start = time.monotonic()
    with pytest.raises(RanksFailed, match="rank 1 was not done after 3 s") as failed:
        pool.run(sleep_through_the_collective, 4, timeout=3)
    assert time.monotonic() - start < 6
    message = str(failed.value)
    assert failed.value.ranks[0] == 1 and sorted(failed.value.ranks) == [0, 1, 2]
    assert (
        "in oversleep" in message.split("--- rank")[1]
        and "in all_reduce" in message.split("--- rank")[2]
    )
    assert "finished: ranks [3]" in message
    assert "/pool.py" not in message
    assert_works(pool)


def test_an_idle_worker_that_was_killed_is_replaced(pool):
    os.kill(pool.run(report_state, 1)[0]["pid"], signal.SIGKILL)
    with pytest.raises(RanksFailed, match="rank 0 was killed by SIGKILL"):
        pool.run(report_state, 1)
    assert_works(pool)


def test_what_cannot_travel_is_an_error(pool):
    with pytest.raises(RanksFailed, match="rank 0 raised .*lambda"):
        pool.run(return_what_cannot_travel, 1)
    with pytest.raises((AttributeError, TypeError, ValueError), match="lambda|pickle"):
        pool.run(lambda launch: None, 1)
    with pytest.raises(ValueError, match="9 ranks asked for, this pool has 1 to 8"):
        pool.run(report_state, 9)
    assert_works(pool)
