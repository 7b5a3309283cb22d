"""Length, evaluation and reporting of a run. Imports no torch."""

import itertools
import re
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class TrainingConfig:
    """Length, evaluation and reporting of a run."""

    train_iters: int | None = None
    """Optimizer steps to train for."""
    train_samples: int | None = None
    """Sequences to train on, in place of --train-iters; a multiple of the global batch size."""
    eval_interval: int = 1000
    """Iterations between evaluations on the validation split, 0 = off."""
    eval_iters: int = 100
    """Global batches in one evaluation, 0 = off."""
    log_interval: int = 10
    """Iterations between lines on the console."""
    metrics_file: str | None = None
    """Append one JSON object a line to this file: each training iteration and each evaluation."""
    tensorboard_dir: str | None = None
    """Write the same numbers as TensorBoard's event files to this folder (rank 0)."""
    wandb_project: str | None = None
    """Send the same numbers to this project of Weights & Biases (rank 0); a resumed run goes on with its curves."""
    wandb_exp_name: str | None = None
    """Name of the run in Weights & Biases. Unset: one is made up there."""
    profile: str | None = None
    """Iterations to profile: first-last, or several such ranges, as 10-12,100-100."""
    profile_dir: str = "profile"
    """Folder for traces (chrome://tracing, ui.perfetto.dev) and snapshots of GPU memory (pytorch.org/memory_viz)."""
    profile_ranks: tuple[str, ...] = ("0",)
    """Ranks that profile."""
    exit_interval: int | None = None
    """Save and exit at the next iteration divisible by this."""
    exit_duration_in_mins: float | None = None
    """Save and exit after this many minutes."""
    exit_signal_handler: bool = True
    """On SIGTERM, SIGINT, SIGHUP or SIGUSR1, save and exit; with --no-exit-signal-handler they
    end the run at once. Under nohup, SIGHUP is ignored."""
    seed: int = 1234
    """Seed of the initial weights, the data order and dropout."""
    rng_scheme: Literal["global", "megatron"] = "global"
    """global: dropout masks depend on seed, sample, layer and element only, so no layout changes them; megatron:
    streams per rank, seeded by Megatron-LM's rule, whose masks differ between layouts."""
    check_replicas: int | None = None
    """Every so many iterations, compare parameters that several ranks hold, to the bit; stop where they differ."""
    dry_run: bool = False
    """Build everything, run one forward and backward, print shapes and memory per stage, write nothing, exit."""

    @property
    def profile_ranges(self) -> list[tuple[int, int]]:
        """(first, last) iteration of each range. Raises ValueError when --profile is not of that form."""
        ranges = [
            re.fullmatch(r"([1-9]\d*)-([1-9]\d*)", part.strip())
            for part in (self.profile or "").split(",")
        ]
        pairs = [(int(match[1]), int(match[2])) for match in ranges if match]
        ends = [number for pair in pairs for number in pair]
        if (
            None in ranges
            or ends != sorted(ends)
            or any(b[0] <= a[1] for a, b in itertools.pairwise(pairs))
        ):
            raise ValueError("not ranges of iterations from 1, first-last, in ascending order")
        return pairs
