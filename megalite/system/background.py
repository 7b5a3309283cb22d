"""Calls on daemon threads. Imports no torch."""

from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import TypeVar

Result = TypeVar("Result")


def in_background(name: str, action: Callable[[], Result]) -> "Future[Result]":
    """Call `action` on a thread of its own; the future gets its result, or what it raises.

    Not an executor's thread: the end of the process would wait for it without a limit.
    """
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(action())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, name=name, daemon=True).start()
    return future
