"""Waits and store calls with a limit, also where a process is suspended. Imports no torch."""

import math
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from megalite.system.background import in_background

STEP_SECONDS = 0.25
"""Longest wait between two looks at the clock."""
SUSPENDED_SECONDS = 2.0
"""If the clock has advanced by more than this between two looks, the process was suspended."""
ANSWER_SECONDS = 10.0
"""Time within which the store must answer."""

Answer = TypeVar("Answer")


class SuspendDetector:
    """Since when this process has run without being suspended (SIGSTOP, or its machine asleep).

    Works as long as some thread waits by `wait`.
    """

    def __init__(self):
        self.since = self._looked = time.monotonic()

    def wait(self, event: threading.Event, seconds: float) -> bool:
        """Whether the event was set within this many seconds, without time spent suspended."""
        for _ in range(math.ceil(seconds / STEP_SECONDS)):
            done = event.wait(min(seconds, STEP_SECONDS))
            now = time.monotonic()
            if now - self._looked > SUSPENDED_SECONDS:
                self.since = now
            self._looked = now
            if done:
                return True
        return event.is_set()


class BoundedStore:
    """torch's store with a limit on each call: the store of a stopped process never answers.

    Each method raises RuntimeError, as the store itself does, when there is no answer in `seconds`.
    """

    def __init__(self, store: Any, suspends: SuspendDetector, seconds: float = ANSWER_SECONDS):
        self._store = store
        self._suspends = suspends
        self._seconds = seconds

    def add(self, key: str, amount: int) -> int:
        """Add to a counter, which starts at 0; return its new value."""
        return self._ask(lambda: self._store.add(key, amount))

    def check(self, key: str) -> bool:
        """Whether the key exists."""
        return self._ask(lambda: self._store.check([key]))

    def set(self, key: str, value: str) -> None:
        """Store a value."""
        self._ask(lambda: self._store.set(key, value))

    def get(self, key: str) -> bytes:
        """The value of a key; waits until it exists."""
        return self._ask(lambda: self._store.get(key))

    def get_existing(self, keys: Iterable[str]) -> dict[str, bytes]:
        """The values of those keys that exist."""
        wanted = list(keys)

        def get() -> dict[str, bytes]:
            existing = wanted
            if not self._store.check(wanted):
                existing = [key for key in wanted if self._store.check([key])]
            return dict(zip(existing, self._store.multi_get(existing)))

        return self._ask(get)

    def _ask(self, action: Callable[[], Answer]) -> Answer:
        answered = threading.Event()
        answer = in_background("store", action)
        answer.add_done_callback(lambda _: answered.set())
        if not self._suspends.wait(answered, self._seconds):
            raise RuntimeError(
                "the process that holds the store (rank 0, or torchrun on the first node) "
                f"does not answer within {self._seconds:g} s"
            )
        return answer.result()
