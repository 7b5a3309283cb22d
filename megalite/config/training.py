"""Length, evaluation and reporting of a run. Imports no torch."""

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from megalite.fields import Field


@dataclass(frozen=True)
class TrainingConfig:
    """Length, evaluation and reporting of a run."""

    train_iters: Annotated[int | None, Field(minimum=1, example=1000)] = None
    """Optimizer steps to train for."""
    train_samples: Annotated[int | None, Field(minimum=1)] = None
    """Sequences to train on, in place of --train-iters; whole global batches."""
    train_tokens: Annotated[int | None, Field(minimum=1)] = None
    """Tokens to train on, in place of --train-iters; rounded up to whole global batches."""
    eval_interval: Annotated[int, Field(minimum=0)] = 1000
    """Iterations between evaluations on the validation split, 0 = off."""
    eval_iters: Annotated[int, Field(minimum=0)] = 100
    """Global batches in one evaluation, 0 = off."""
    log_interval: Annotated[int, Field(minimum=1, changes_numbers=False)] = 10
    """Iterations between lines on the console."""
    log_communication: Annotated[bool, Field(changes_numbers=False)] = False
    """With each line on the console, print calls, bytes, time and bandwidth of the step's
    communication by group and kind."""
    metrics_file: Annotated[str | None, Field(changes_numbers=False)] = None
    """Append one JSON object a line to this file: each training iteration and each evaluation."""
    tensorboard_dir: Annotated[
        str | None, Field(changes_numbers=False, needs_library="tensorboard")
    ] = None
    """Write the same numbers as TensorBoard's event files to this folder (rank 0)."""
    wandb_project: Annotated[str | None, Field(changes_numbers=False, needs_library="wandb")] = None
    """Send the same numbers to this project of Weights & Biases (rank 0); a resumed run continues
    its curves."""
    wandb_exp_name: Annotated[str | None, Field(changes_numbers=False)] = None
    """Name of the run in Weights & Biases. Unset: the service chooses one."""
    profile: Annotated[str | None, Field(changes_numbers=False)] = None
    """Iterations to profile: first-last, or several such ranges, as 10-12,100-100."""
    profile_dir: Annotated[str, Field(changes_numbers=False)] = "profile"
    """Folder for traces (chrome://tracing, ui.perfetto.dev) and snapshots of GPU memory
    (pytorch.org/memory_viz)."""
    profile_ranks: Annotated[tuple[str, ...], Field(changes_numbers=False)] = ("0",)
    """Ranks that profile."""
    exit_interval: Annotated[int | None, Field(minimum=1, changes_numbers=False)] = None
    """Save and exit at the next iteration divisible by this."""
    exit_duration_in_mins: Annotated[float | None, Field(above=0, changes_numbers=False)] = None
    """Save and exit after this many minutes."""
    exit_signal_handler: Annotated[bool, Field(changes_numbers=False)] = True
    """On SIGTERM, SIGINT, SIGHUP or SIGUSR1, save and exit; with --no-exit-signal-handler they
    end the run at once. Under nohup, SIGHUP is ignored."""
    seed: Annotated[int, Field(minimum=0)] = 1234
    """Seed of the initial weights, the data order and dropout."""
    rng_scheme: Literal["global", "megatron"] = "global"
    """global: dropout masks depend on seed, sample, layer and element only, so no layout changes
    them; megatron: streams per rank, seeded by Megatron-LM's rule, whose masks differ between
    layouts."""
    check_replicas: Annotated[int | None, Field(minimum=1, changes_numbers=False)] = None
    """Iterations between comparisons, bit by bit, of the parameters that several ranks hold; the
    run stops where they differ."""
    dry_run: Annotated[bool, Field(changes_numbers=False)] = False
    """Build everything, run one forward and backward, print shapes and memory per stage, write
    nothing, exit."""

    @property
    def profile_ranges(self) -> list[tuple[int, int]]:
        """(first, last) iteration of each range. Raises ValueError when --profile is not of that
        form."""
        pairs = []
        last = 0
        for text in (self.profile or "").split(","):
            match = re.fullmatch(r"([1-9]\d*)-([1-9]\d*)", text.strip())
            if not match or not last < int(match[1]) <= int(match[2]):
                raise ValueError("not ranges of iterations from 1, first-last, in ascending order")
            last = int(match[2])
            pairs.append((int(match[1]), last))
        return pairs
