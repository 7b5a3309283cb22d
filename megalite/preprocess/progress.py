"""The progress of a preprocessing run, and its display."""

import sys
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta

SPENT_ON = ("read", "parse", "encode", "write")
KEPT = ("bytes_total", "bytes_done", "documents", "tokens", "bad_lines", "empty")
"""Counts that are stored, to resume from. The total of several runs is the sum of each."""


@dataclass
class PreprocessProgress:
    """How much of a run is done, and where its time went."""

    bytes_total: int = 0
    """Bytes of all input; 0: not known before it is read, as of compressed files."""
    bytes_done: int = 0
    documents: int = 0
    tokens: int = 0
    seconds: float = 0.0
    bytes_now: int = 0
    """Part of bytes_done that this run processed; an interrupted run before it did the rest."""
    tokens_now: int = 0
    """Part of tokens that this run wrote."""
    spent: dict[str, float] = field(default_factory=lambda: dict.fromkeys(SPENT_ON, 0.0))
    """Seconds, summed over processes, by what they were spent on."""
    bad_lines: int = 0
    last_bad_line: str = ""
    """The last bad line that this run left out: file, line number and reason."""
    empty: int = 0
    """Blank lines and documents with an empty text that were left out (--skip-empty)."""

    @classmethod
    def restored(cls, stored: dict) -> "PreprocessProgress":
        """The progress that an earlier run stored as JSON: nothing of it was done in this run."""
        kept = (*KEPT, "last_bad_line")
        return cls(**{name: stored[name] for name in kept if name in stored})

    @classmethod
    def total(cls, shards: Iterable["PreprocessProgress"]) -> "PreprocessProgress":
        """The progress of several runs at the same time, summed."""
        total = cls()
        for shard in shards:
            for name in (*KEPT, "bytes_now", "tokens_now"):
                setattr(total, name, getattr(total, name) + getattr(shard, name))
            for name, seconds in shard.spent.items():
                total.spent[name] += seconds
            total.seconds = max(total.seconds, shard.seconds)
            total.last_bad_line = total.last_bad_line or shard.last_bad_line
        return total

    def __str__(self) -> str:
        seconds = max(self.seconds, 1e-9)
        rate = self.bytes_now / seconds
        total = ""
        left = ""
        if self.bytes_total:
            total = f" of {self.bytes_total / 1e6:,.1f}"
            seconds_left = round((self.bytes_total - self.bytes_done) / max(rate, 1e-9))
            left = f", left {timedelta(seconds=seconds_left)}"
        return (
            f"{self.bytes_done / 1e6:,.1f}{total} MB, {self.documents:,} documents, "
            f"{self.tokens:,} tokens, {rate / 1e6:,.1f} MB/s, "
            f"{self.tokens_now / seconds:,.0f} tokens/s{left}"
        )

    def where(self) -> str:
        """Where the time went, in one line."""
        spent = ", ".join(f"{name} {seconds:.2f}" for name, seconds in self.spent.items())
        return f"{self.seconds:.2f} s; seconds of all processes: {spent}"


@contextmanager
def show_progress(seconds_between_lines: float = 5.0):
    """Yields a function for `preprocess` that shows progress on stderr.

    On a terminal it draws a bar, otherwise it prints plain lines.
    """
    if sys.stderr.isatty():
        from rich import progress as rich
        from rich.console import Console

        columns = (rich.BarColumn(), rich.TextColumn("{task.description}"))
        columns += (rich.TimeRemainingColumn(),)
        with rich.Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("starting")

            def update_bar(progress: PreprocessProgress) -> None:
                sizes = {"completed": progress.bytes_done, "total": progress.bytes_total or None}
                bar.update(task, description=str(progress), **sizes)

            yield update_bar
        return
    printed = PreprocessProgress()

    def print_line(progress: PreprocessProgress) -> None:
        nonlocal printed
        is_due = progress.seconds >= printed.seconds + seconds_between_lines
        is_last = progress.bytes_done == progress.bytes_total
        if progress.bytes_done != printed.bytes_done and (is_due or is_last):
            printed = replace(progress)
            print(progress, file=sys.stderr, flush=True)

    yield print_line
