"""Console output: lines of rank 0, and standard streams whose failure does not end a training."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

from megalite.parallel.context import ParallelContext
from megalite.system.errors import explain_os_error

Log = Callable[[str], None]
"""Prints a line."""


def rank_0_printer(context: ParallelContext) -> Log:
    """A function that prints a line on rank 0 and does nothing on the others."""

    def log(text: str) -> None:
        if context.rank == 0:
            print(text, flush=True)

    return log


class FailSafeStream:
    """Stands for `sys.stdout` or `sys.stderr`: drops what cannot be written, and reports it once.

    The disk under a log may be full (ENOSPC), the reader of a pipe may have ended (EPIPE), a
    terminal may be closed (EIO). Every write is tried, so a log continues once there is space.
    """

    def __init__(self, name: str, rank: int):
        self._stream = getattr(sys, name)
        self._name = name
        self._rank = rank
        self._failed = False

    def write(self, text: str) -> int:
        """Write the text if that is possible. Returns its length."""
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        """Flush what can be flushed."""
        self._try(self._stream.flush)

    def _try(self, action: Callable, *arguments: str) -> None:
        """Call one of the stream's methods. Name the first failure on the other stream."""
        try:
            action(*arguments)
        except OSError as error:
            if self._failed:
                return
            self._failed = True  # before the report: the other stream may fail too, and report here
            other = getattr(sys, "stderr" if self._name == "stdout" else "stdout")
            problem = f"{self._name} cannot be written, training continues"
            text = f"rank {self._rank}: {problem}: {explain_os_error(error)}"
            print(text, file=other, flush=True)

    def close(self) -> None:
        """Send what could not be written to /dev/null. The underlying stream stays open.

        Python flushes the standard streams when it exits, and exits with status 120 if that fails.
        """
        try:
            self._stream.flush()
        except OSError:
            with suppress(OSError), open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


@contextmanager
def failsafe_output(rank: int) -> Iterator[None]:
    """While the block runs, no failure of stdout or stderr raises an exception, in any thread."""
    with ExitStack() as stack:
        for name in ("stdout", "stderr"):
            before = getattr(sys, name)
            if before is None:  # the process was started without it
                continue
            stream = FailSafeStream(name, rank)
            setattr(sys, name, stream)
            stack.callback(stream.close)
            stack.callback(setattr, sys, name, before)
        yield
