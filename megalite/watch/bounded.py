"""Waits and store calls that end: a process may be suspended meanwhile, a store may not answer. Imports no torch."""

import math
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

STEP_SECONDS = 0.25
"""Longest wait without a look at the clock."""
SUSPENDED_SECONDS = 2.0
"""Who looks at the clock so much too late was suspended, with its process."""
ANSWER_SECONDS = 10.0
"""In which the store must answer."""

Answer = TypeVar("Answer")


class SuspendDetector:
    """Since when this process has run without a break: was not stopped (SIGSTOP), nor asleep with its machine.

    Known as long as some thread of it waits by `wait`.
    """

    def __init__(self):
        self.since = self._looked = time.monotonic()

    def wait(self, event: threading.Event, seconds: float) -> bool:
        """Whether the event was set within so many seconds of being awake."""
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
    """torch's store, with a limit on each call: that of a stopped process does not answer at all.

    Each raises RuntimeError, as the store itself does, when there is no answer within so many `seconds`.
    """

    def __init__(self, store: Any, awake: SuspendDetector, seconds: float = ANSWER_SECONDS):
        self._store, self._awake, self._seconds = store, awake, seconds

    def add(self, key: str, amount: int) -> int:
        """Add to a counter, which is 0 at first; returns what it is then."""
        return self._ask(lambda: self._store.add(key, amount))

    def check(self, key: str) -> bool:
        """Whether there is such a key."""
        return self._ask(lambda: self._store.check([key]))

    def set(self, key: str, value: str) -> None:
        """Put a value under a key."""
        self._ask(lambda: self._store.set(key, value))

    def get(self, key: str) -> bytes:
        """The value, waited for."""
        return self._ask(lambda: self._store.get(key))

    def get_those_there(self, keys: Iterable[str]) -> dict[str, bytes]:
        """The values of those keys that there are."""

        wanted = list(keys)

        def get() -> dict[str, bytes]:
            there = (
                wanted
                if self._store.check(wanted)
                else [key for key in wanted if self._store.check([key])]
            )
            return dict(zip(there, self._store.multi_get(there)))

        return self._ask(get)

    def _ask(self, action: Callable[[], Answer]) -> Answer:
        answers: list[Answer | Exception] = []
        answered = threading.Event()

        def act() -> None:
            try:
                answers.append(action())
            except Exception as error:
                answers.append(error)
            answered.set()

        threading.Thread(target=act, daemon=True).start()
        if not self._awake.wait(answered, self._seconds):
            who = "the process that ranks meet in (rank 0, or torchrun on the first node)"
            raise RuntimeError(f"{who} does not answer within {self._seconds:g} s")
        if isinstance(answers[0], Exception):
            raise answers[0]
        return answers[0]
