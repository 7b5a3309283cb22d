"""What all tests share: one thread per process, a pool of ranks, the cheapest files first."""

import os
import signal
from contextlib import closing

os.environ["OMP_NUM_THREADS"] = (
    "1"  # before torch is loaded, here and in the ranks: results are compared to the bit
)
os.environ["WANDB_MODE"] = "offline"

import pytest

pytest.register_assert_rewrite("tests.checks")
# Under nohup, processes that tests start would ignore a closed terminal, too.
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of pure tests run first, then those that use torch, then those that start ranks."""

    def cost(item: pytest.Item) -> int:
        if "pool" in getattr(item, "fixturenames", ()):
            return 2
        return int(hasattr(getattr(item, "module", None), "torch"))

    costs: dict = {}
    for item in items:
        costs[item.path] = max(cost(item), costs.get(item.path, 0))
    items.sort(key=lambda item: costs[item.path])


@pytest.fixture(scope="session")
def pool():
    """Worker processes that run functions as ranks: `pool.run(function, world_size, *args)`."""
    from tests.pool import RankPool

    with closing(RankPool(max_ranks=8)) as ranks:
        yield ranks
