"""How a program reports problems and failures: a line for each on stderr, and an exit status."""

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

REMEDIES = {
    errno.EACCES: "change its permissions (chmod, chown), or give another path",
    errno.ENOENT: "check the path",
    errno.ENOSPC: "free space on that disk, or write to another one",
    errno.EMFILE: "raise the limit of open files: ulimit -n 65536",
}
"""What to do about the errors of the operating system that a user can cause and correct."""


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
def failures_reported(*expected: type[Exception]) -> Iterator[None]:
    """End the program with a message, in place of a traceback, when the block raises an expected
    exception.

    Expected are the given types, OSError and Ctrl-C. That the reader of the output has ended is no
    error: `start` handles it.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except (OSError, KeyboardInterrupt, *expected) as error:
        fail(describe(error))


def describe(error: BaseException) -> str:
    """The message of an exception; for an error of the operating system also a remedy."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    remedy = REMEDIES.get(getattr(error, "errno", None))
    return f"{error}; {remedy}" if remedy else str(error)
