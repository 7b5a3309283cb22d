"""Reading the next step's samples while this step computes."""

from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import Generic, TypeVar

CLOSE_SECONDS = 5.0
"""What is still being read at the end of a run is waited for so long: its disk may hang."""

Batches = TypeVar("Batches")


class Prefetcher(Generic[Batches]):
    """Calls `read(consumed)` on a thread of its own, one step ahead.

    What is read depends on `consumed` alone, so a guess that turns out wrong costs time and nothing else.
    """

    def __init__(self, read: Callable[[int], Batches]):
        self._read = read
        self._ahead: tuple[int, Future] | None = None
        self._thread: Thread | None = None

    def get(self, consumed: int, then: int | None) -> Batches:
        """What `read(consumed)` gives; reading at `then` (None: nothing) begins. Raises what `read` raises."""
        ahead, self._ahead = self._ahead, None
        result = (
            ahead[1].result()
            if ahead is not None and ahead[0] == consumed
            else self._read(consumed)
        )
        if then is not None:
            self._ahead = then, self._begin(then)
        return result

    def _begin(self, consumed: int) -> "Future[Batches]":
        found: Future[Batches] = Future()

        def read() -> None:
            try:
                found.set_result(self._read(consumed))
            except BaseException as error:
                found.set_exception(error)

        # Not an executor's: the end of the process would wait for it for ever.
        self._thread = Thread(target=read, name="prefetch", daemon=True)
        self._thread.start()
        return found

    def close(self) -> None:
        """Drop what is being read; wait a few seconds for it."""
        self._ahead = None
        if self._thread is not None:
            self._thread.join(CLOSE_SECONDS)
