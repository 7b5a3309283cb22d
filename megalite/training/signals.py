"""Signals that ask a run to save and stop, and what the ranks agree on because of them."""

import signal
from dataclasses import dataclass


@dataclass(frozen=True)
class Stop:
    """Why a run stops."""

    reason: str
    requeue: bool = False
    """Whether it should be continued: its time is over, but nobody wants it to end."""


class StopSignals:
    """Remembers the signals it catches, in place of what they would do to the process.

    SIGUSR1 is the warning of a job script that the time is nearly over. SIGTERM, SIGINT and SIGHUP
    (the terminal was closed) mean that someone wants the run to end. A second SIGINT raises
    KeyboardInterrupt: a person at the terminal does not want to wait for the step to finish.

    A context manager, which gives the signals their former handlers back at its end.
    """

    def __init__(self, enabled: bool = True):
        self.received: signal.Signals | None = None
        """The last signal caught."""
        self._enabled = enabled
        self._interrupted = False
        self._former = {}

    def __enter__(self) -> "StopSignals":
        return self

    def __exit__(self, *unused: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def catch(self, *numbers: signal.Signals) -> None:
        """Remember these signals from now on. Under nohup, SIGHUP stays ignored."""
        for number in numbers if self._enabled else ():
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._former[number] = signal.signal(number, self._remember)

    def _remember(self, number: int, frame) -> None:
        if number == signal.SIGINT:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
        self.received = signal.Signals(number)

    @property
    def is_time_warning(self) -> bool:
        """Whether the last signal caught was SIGUSR1."""
        return self.received == signal.SIGUSR1

    def counts(self) -> dict[str, float]:
        """This rank's share of the sums over ranks that `stop` wants."""
        signalled = float(self.received is not None)
        return {"signalled": signalled, "time_warnings": float(self.is_time_warning)}

    def stop(self, sums: dict[str, float]) -> Stop | None:
        """Why all ranks have to stop, from the sums of their `counts`; None without a signal."""
        if not sums["signalled"]:
            return None
        reason = self.received.name if self.received else "a signal to another rank"
        return Stop(reason, requeue=sums["signalled"] == sums["time_warnings"])
