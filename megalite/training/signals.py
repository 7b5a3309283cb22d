"""Signals that ask a run to save and exit."""

import signal
from collections.abc import Iterable


class StopSignals:
    """While installed, SIGTERM, SIGINT and SIGUSR1 are remembered in place of ending the process.

    A second SIGINT ends it at once, for a person at a terminal who does not want to wait for the step to finish. Within
    others that are installed, these begin with what the outer ones have received.
    """

    CAUGHT = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self, enabled: bool = True, caught: Iterable[signal.Signals] = CAUGHT):
        self.received: signal.Signals | None = None
        """The last one caught."""
        self._interrupted = False
        self._before = (
            {number: signal.signal(number, self._remember) for number in caught} if enabled else {}
        )
        # Only now that all are installed: what comes between goes to the one or to the other.
        for outer in (getattr(handler, "__self__", None) for handler in self._before.values()):
            if isinstance(outer, StopSignals):
                self.received = self.received or outer.received

    @property
    def warned(self) -> bool:
        """Whether the last one was SIGUSR1, by which job scripts say that the time is nearly over: the others mean that
        someone wants the run to end."""
        return self.received == signal.SIGUSR1

    def _remember(self, number: int, frame) -> None:
        if self._interrupted and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._interrupted |= number == signal.SIGINT
        self.received = signal.Signals(number)

    def uninstall(self) -> None:
        """Give the signals their former handlers back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
