"""Length, evaluation and reporting of a run. Imports no torch."""

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from megalite.fields import Field

MAX_TRACED = 100
"""Iterations of a trace: its events are kept in memory."""
WARM_UP = 2
"""Iterations before a trace, where its first one is not given."""


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
    trace: Annotated[str | None, Field(changes_numbers=False)] = None
    """Write a trace of a few iterations to this folder (ui.perfetto.dev, chrome://tracing): what
    each rank computes, by microbatch and stage, and when it waits for others or for data."""
    trace_iterations: Annotated[str | None, Field(changes_numbers=False)] = None
    """Iterations to trace: first-last, 100 at most. Unset: the third to the fifth of this run."""
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
        pairs: list[tuple[int, int]] = []
        for text in (self.profile or "").split(","):
            after = pairs[-1][1] if pairs else 0
            pair = _range_after(after, text)
            if pair is None:
                raise ValueError("not ranges of iterations from 1, first-last, in ascending order")
            pairs.append(pair)
        return pairs

    def trace_range(self, begins_at: int = 1) -> tuple[int, int]:
        """(first, last) iteration of the trace of a run that begins at this one; fewer than asked
        for where the run ends. Raises ValueError when --trace-iterations is not of that form."""
        if self.trace_iterations is None:
            end = self.train_iters or begins_at + WARM_UP + 2
            return min(begins_at + WARM_UP, end), min(begins_at + WARM_UP + 2, end)
        pair = _range_after(0, self.trace_iterations)
        if pair is None:
            raise ValueError("not a range of iterations from 1, first-last")
        if pair[1] - pair[0] >= MAX_TRACED:
            raise ValueError(f"more than {MAX_TRACED} iterations")
        return pair


def _range_after(last: int, text: str) -> tuple[int, int] | None:
    """The iterations of `first-last`, if they come after `last`."""
    match = re.fullmatch(r"([1-9]\d*)-([1-9]\d*)", text.strip())
    if match is None or not last < int(match[1]) <= int(match[2]):
        return None
    return int(match[1]), int(match[2])
