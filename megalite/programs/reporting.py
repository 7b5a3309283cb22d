"""How a program reports problems and failures: a line for each on stderr, and an exit status."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from megalite.system.errors import ReportedError, error_message


def refuse(problems: list[str]) -> None:
    """Print every problem and exit with status 2; return if there is none."""
    if problems:
        print_errors(problems)
        raise SystemExit(2)


def fail(message: str) -> NoReturn:
    """Print a message, which may have several lines, and exit with status 1."""
    print_errors(message.splitlines())
    raise SystemExit(1)


def print_errors(lines: list[str]) -> None:
    """Print lines to stderr, each marked as an error."""
    for line in lines:
        print(f"error: {line}", file=sys.stderr)


@contextmanager
def failures_reported(status: int = 1) -> Iterator[None]:
    """End the program with a message and this status, in place of a traceback, when the block
    raises a ReportedError, an OSError or KeyboardInterrupt.

    That the reader of the output has ended is no error: `start` handles it.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except (ReportedError, OSError, KeyboardInterrupt) as error:
        print_errors(describe(error).splitlines())
        raise SystemExit(status) from None


def describe(error: BaseException) -> str:
    """The message of an exception; for an error of the operating system the file and a fix."""
    return "interrupted" if isinstance(error, KeyboardInterrupt) else error_message(error)
