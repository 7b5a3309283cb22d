"""Reading the next step's samples while this step computes."""

from collections.abc import Callable
from concurrent.futures import Future, wait
from functools import partial
from typing import Generic, TypeVar

from megalite.system.background import in_background

CLOSE_SECONDS = 5.0
"""How long the end of a run waits for what is still being read: the disk may not answer."""

Batches = TypeVar("Batches")


class Prefetcher(Generic[Batches]):
    """Calls `read(consumed)` on a thread of its own, one step ahead.

    What is read depends on `consumed` alone, so a wrong guess costs time and nothing else.
    """

    def __init__(self, read: Callable[[int], Batches]):
        self._read = read
        self._ahead: dict[int, Future[Batches]] = {}
        """What is being read, by its `consumed`: one entry at most."""

    def get(self, consumed: int, then: int | None) -> Batches:
        """Return `read(consumed)`, and begin to read at `then` (None: nothing).

        Raises what `read` raises.
        """
        ahead = self._ahead.pop(consumed, None)
        self._ahead.clear()
        result = self._read(consumed) if ahead is None else ahead.result()
        if then is not None:
            self._ahead[then] = in_background("prefetch", partial(self._read, then))
        return result

    def close(self) -> None:
        """Drop what is being read; wait a few seconds for it."""
        wait(self._ahead.values(), CLOSE_SECONDS)
        self._ahead.clear()
