"""Reading the next step's samples while this step computes."""

from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import Generic, TypeVar

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
        self._thread: Thread | None = None

    def get(self, consumed: int, then: int | None) -> Batches:
        """Return `read(consumed)`, and begin to read at `then` (None: nothing).

        Raises what `read` raises.
        """
        ahead = self._ahead.pop(consumed, None)
        self._ahead.clear()
        result = self._read(consumed) if ahead is None else ahead.result()
        if then is not None:
            self._ahead[then] = self._begin(then)
        return result

    def _begin(self, consumed: int) -> "Future[Batches]":
        future: Future[Batches] = Future()

        def read() -> None:
            try:
                future.set_result(self._read(consumed))
            except BaseException as error:
                future.set_exception(error)

        # Not an executor's thread: the end of the process would wait for it without a limit.
        self._thread = Thread(target=read, name="prefetch", daemon=True)
        self._thread.start()
        return future

    def close(self) -> None:
        """Drop what is being read; wait a few seconds for it."""
        self._ahead.clear()
        if self._thread is not None:
            self._thread.join(CLOSE_SECONDS)
