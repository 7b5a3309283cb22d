"""How far a preprocessing has come, and showing it."""

import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta


@dataclass
class Progress:
    """How far a run has come, and where its time went."""

    bytes_total: int
    """Of all input; 0: not known before it is read, as of compressed files."""
    bytes_done: int = 0
    documents: int = 0
    tokens: int = 0
    seconds: float = 0.0
    bytes_now: int = 0
    """Of those done, the ones of this run; the others are an interrupted one's."""
    tokens_now: int = 0
    spent: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("read", "parse", "encode", "write"), 0.0)
    )
    """Seconds of all processes by what they were spent on."""
    bad_lines: int = 0
    last_bad_line: str = ""
    """The last one that this run left out: file, line and reason."""

    @classmethod
    def total(cls, parts: list["Progress"]) -> "Progress":
        """Of several runs at once, together."""
        summed = (
            "bytes_total",
            "bytes_done",
            "documents",
            "tokens",
            "bytes_now",
            "tokens_now",
            "bad_lines",
        )
        spent = {name: sum(part.spent[name] for part in parts) for name in parts[0].spent}
        totals = {name: sum(getattr(part, name) for part in parts) for name in summed}
        seconds, bad = max(part.seconds for part in parts), [part.last_bad_line for part in parts]
        return cls(**totals, seconds=seconds, spent=spent, last_bad_line=max(bad, key=bool))

    def __str__(self) -> str:
        seconds = max(self.seconds, 1e-9)
        rate, total, left = self.bytes_now / seconds, "", ""
        if self.bytes_total:
            total = f" of {self.bytes_total / 1e6:,.1f}"
            left = f", left {timedelta(seconds=round((self.bytes_total - self.bytes_done) / max(rate, 1e-9)))}"
        return (
            f"{self.bytes_done / 1e6:,.1f}{total} MB, {self.documents:,} documents, {self.tokens:,} tokens, "
            f"{rate / 1e6:,.1f} MB/s, {self.tokens_now / seconds:,.0f} tokens/s{left}"
        )

    def where(self) -> str:
        """Where the time went, in a line."""
        parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in self.spent.items())
        return f"{self.seconds:.2f} s; seconds of all processes: {parts}"


@contextmanager
def show_progress(seconds_between_lines: float = 5.0):
    """Gives a function for `preprocess` that shows progress on stderr: a bar on a terminal, otherwise plain lines."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
        with Bar(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("starting")
            yield lambda p: bar.update(
                task, description=str(p), completed=p.bytes_done, total=p.bytes_total or None
            )
        return
    next_line, shown = seconds_between_lines, None

    def print_line(progress: Progress) -> None:
        nonlocal next_line, shown
        done = progress.bytes_done == progress.bytes_total
        if progress.bytes_done != shown and (done or progress.seconds >= next_line):
            next_line, shown = progress.seconds + seconds_between_lines, progress.bytes_done
            print(progress, file=sys.stderr, flush=True)

    yield print_line
