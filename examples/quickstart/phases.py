"""Phases of a quickstart, which are shown, timed and resumed, and the tables at its end."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

FINISHED = "finished"
"""File in the folder of a run that is complete."""


class Phases:
    """Runs commands one after another and keeps their times."""

    def __init__(self, console: Console, total: int):
        self.console = console
        self.total = total
        self.times: dict[str, float | None] = {}

    def run(self, title: str, *commands: str, done: bool = False) -> None:
        """Show and run the shell commands of a phase; none when it is done already. Exits if one
        fails."""
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
                    f"status {status}. The same `make` command resumes from here.", style="bold red"
                )
                sys.exit(status)
        self.times[title] = time.monotonic() - began
        self.console.print(f"{self.times[title]:.1f} s", style="bold")


def run_command(command: str) -> int:
    """Run a shell command; returns its status as a shell would. Ctrl-C is left to the command:
    training saves first."""
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
    """Rename the folder of a finished run, and create it again; nothing is deleted."""
    if (run / FINISHED).exists():
        number = 1
        while run.with_name(f"{run.name}-{number}").exists():
            number += 1
        aside = run.rename(run.with_name(f"{run.name}-{number}"))
        console.print(f"The earlier finished run is now in {aside}.")
    run.mkdir(parents=True, exist_ok=True)


def prepare() -> Console:
    """Change to the repository's root, and set the environment of the commands.

    PATH is set as by `source .venv/bin/activate`, and each rank gets one thread, since 8 ranks
    share the cores.
    """
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
    """One row for each evaluation: mean training loss since the one before, and validation loss.

    more: further metrics, each a column of shares.
    """
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
    """Seconds of each phase, and of all together."""
    table = Table("phase", "seconds", title="Time", show_footer=True)
    table.columns[1].justify = "right"
    for title, seconds in times.items():
        table.add_row(title, "earlier" if seconds is None else f"{seconds:.1f}")
    table.columns[0].footer = "in all"
    table.columns[1].footer = f"{sum(filter(None, times.values())):.1f}"
    return table
