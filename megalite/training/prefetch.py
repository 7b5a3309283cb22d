"""Reading the next step's samples while this step computes."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Batches = TypeVar("Batches")


class Prefetcher(Generic[Batches]):
    """Calls `read(consumed)` on a thread of its own, one step ahead.

    What is read depends on `consumed` alone, so a guess that turns out wrong costs time and nothing else.
    """

    def __init__(self, read: Callable[[int], Batches]):
        self._read = read
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._ahead: tuple[int, Future] | None = None

    def get(self, consumed: int, then: int | None) -> Batches:
        """What `read(consumed)` gives; reading at `then` (None: nothing) begins. Raises what `read` raises."""
        ahead, self._ahead = self._ahead, None
        result = ahead[1].result() if ahead is not None and ahead[0] == consumed else self._read(consumed)
        if then is not None:
            self._ahead = then, self._thread.submit(self._read, then)
        return result

    def close(self) -> None:
        """End the thread; what it reads is dropped."""
        self._ahead = None
        self._thread.shutdown(wait=True, cancel_futures=True)
