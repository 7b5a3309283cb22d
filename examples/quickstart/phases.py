"""What the quickstarts share: phases that are shown, timed and gone on with, and what a run leaves."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

FINISHED = "finished"
"""File in the folder of a run that came to its end."""


class Phases:
    """Runs commands one after another and keeps their times."""

    def __init__(self, console: Console, total: int):
        self.console = console
        self.total = total
        self.times: dict[str, float | None] = {}

    def run(self, title: str, *commands: str, done: bool = False) -> None:
        """Run the shell commands of a phase, each shown first, or none when it is done already. Exits if one fails."""
        self.console.print()
        self.console.rule(f"[bold]{len(self.times) + 1}/{self.total} {title}", align="left")
        if done:
            self.times[title] = None
            self.console.print("done in an earlier run")
            return
        began = time.monotonic()
        for command in commands:
            self.console.print(
                f"$ {command}", style="cyan", markup=False, highlight=False, soft_wrap=True
            )
            status = run_command(command)
            if status:
                self.console.print(
                    f"status {status}. The same `make` command goes on from here.", style="bold red"
                )
                sys.exit(status)
        self.times[title] = time.monotonic() - began
        self.console.print(f"{self.times[title]:.1f} s", style="bold")


def run_command(command: str) -> int:
    """Run a shell command; returns its status as a shell would. Ctrl-C is left to the command: training saves first."""
    process = subprocess.Popen(command, shell=True)
    while True:
        try:
            status = process.wait()
            return status if status >= 0 else 128 - status
        except KeyboardInterrupt:
            pass


def latest_iteration(run: Path) -> int:
    """Iteration of the latest checkpoint, 0 before the first."""
    latest = run / "checkpoints" / "latest_checkpointed_iteration.txt"
    return int(latest.read_text()) if latest.exists() else 0


def move_finished_run_aside(run: Path, console: Console) -> None:
    """Make room for a new run; never deletes anything."""
    if (run / FINISHED).exists():
        numbers = (n for n in range(1, 10_000) if not run.with_name(f"{run.name}-{n}").exists())
        aside = run.rename(run.with_name(f"{run.name}-{next(numbers)}"))
        console.print(f"The finished run of before is now in {aside}.")
    run.mkdir(parents=True, exist_ok=True)


def prepare() -> Console:
    """Go to the repository's root, and take the programs of the environment this runs in, as after `source
    .venv/bin/activate`, with one thread for each of the 8 ranks: they share the cores."""
    os.chdir(Path(__file__).resolve().parents[2])
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    os.environ["OMP_NUM_THREADS"] = "1"
    console = Console()
    console.print("To copy the commands below: source .venv/bin/activate; export OMP_NUM_THREADS=1")
    return console


def read_metrics(run: Path) -> list[dict]:
    """The lines of the metrics file."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def loss_table(lines: list[dict], seq_length: int, more: tuple[str, ...] = ()) -> Table:
    """One row for each evaluation: mean training loss since the one before, validation loss, and `more` columns of the
    metrics, as shares."""
    titles = (name.replace("_", " ") for name in more)
    table = Table(
        "iteration", "tokens seen", "training loss", "validation loss", *titles, title="Loss"
    )
    for column in table.columns:
        column.justify = "right"
    training = {line["iteration"]: line for line in lines if "loss" in line}
    validation = {line["iteration"]: line for line in lines if "validation_loss" in line}
    last = 0
    for iteration, line in sorted(validation.items()):
        since = [training[i]["loss"] for i in range(last + 1, iteration + 1)]
        tokens = training[iteration]["consumed_samples"] * seq_length
        shares = (f"{line[name]:.1%}" for name in more)
        mean = sum(since) / len(since)
        table.add_row(
            str(iteration), f"{tokens:,}", f"{mean:.3f}", f"{line['validation_loss']:.3f}", *shares
        )
        last = iteration
    return table


def time_table(times: dict[str, float | None]) -> Table:
    """Seconds of each phase and in all."""
    table = Table("phase", "seconds", title="Time", show_footer=True)
    table.columns[1].justify = "right"
    for title, seconds in times.items():
        table.add_row(title, "earlier" if seconds is None else f"{seconds:.1f}")
    table.columns[0].footer, table.columns[1].footer = (
        "in all",
        f"{sum(filter(None, times.values())):.1f}",
    )
    return table
