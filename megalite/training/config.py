"""Length, evaluation and reporting of a run. Imports no torch."""

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
    exit_interval: int | None = None
    """Save and exit at the next iteration divisible by this."""
    exit_duration_in_mins: float | None = None
    """Save and exit after this many minutes."""
    exit_signal_handler: bool = True
    """On SIGTERM, SIGINT or SIGUSR1, save and exit; with --no-exit-signal-handler they end the run at once."""
    seed: int = 1234
    """Seed of the initial weights, the data order and dropout."""
    rng_scheme: Literal["global", "megatron"] = "global"
    """global: dropout masks depend on seed, sample, layer and element only, so no layout changes them; megatron:
    streams per rank, seeded by Megatron-LM's rule, whose masks differ between layouts."""
    check_replicas: int | None = None
    """Every so many iterations, compare parameters that several ranks hold, to the bit; stop where they differ."""
    dry_run: bool = False
    """Build everything, run one forward and backward, print shapes and memory per stage, write nothing, exit."""
