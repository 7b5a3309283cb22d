"""What a run reports: a line on the console, and one JSON object a line in the metrics file."""

import json
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

from megalite.system.errors import explain_os_error
from megalite.training.output import Log

TAIL_BYTES = 1 << 16
"""More than a line of the metrics file has."""


class MetricsFile:
    """Appends JSON lines as they happen, with full float precision.

    Raises OSError when the file cannot be opened. Later failures, such as a full disk, do not end
    the training: a line that cannot be written is dropped, and the first one is reported. Every
    line is tried, so the file continues once there is space.
    """

    def __init__(self, path: str, report: Log):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "ab+", buffering=0)
        self._report = report
        self._dropped = 0
        self._cut_torn_line()

    def _cut_torn_line(self) -> None:
        """Cut off a last line without an end, left by a full disk or a power failure: it would
        spoil the next one."""
        size = self._file.seek(0, 2)
        start = max(0, size - TAIL_BYTES)
        self._file.seek(start)
        tail = self._file.read(size - start)
        if tail and not tail.endswith(b"\n"):
            self._file.truncate(start + tail.rfind(b"\n") + 1)

    def write(self, **values: float) -> None:
        """Append one object. The line is complete, or dropped, before the next step starts."""
        rest = json.dumps(values).encode() + b"\n"
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            if not self._dropped:
                error.filename = self._file.name
                problem = explain_os_error(error)
                self._report(f"--metrics-file cannot be written, training continues: {problem}")
            self._dropped += 1
            with suppress(OSError):
                self._cut_torn_line()

    def close(self) -> None:
        """Close the file. Reports how many lines were dropped."""
        with suppress(OSError):  # of a network disk that is full
            self._file.close()
        if self._dropped:
            self._report(f"--metrics-file {self._file.name}: {self._dropped} lines were dropped")


def with_total(terms: dict[str, float]) -> dict[str, float]:
    """The terms of a loss by name, after their sum under `loss`, a name a single term may have."""
    return {"loss": sum(terms.values()), **terms}


def format_losses(losses: dict[str, float]) -> str:
    """Losses by name, for the console."""
    return " | ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in losses.items())


def training_line(
    metrics: dict[str, float], losses: dict[str, float], total: int, flops: float, average: float
) -> str:
    """One line for the console.

    metrics: what the metrics file gets for this iteration. losses: those to show, after
    `with_total`. total: iterations of the whole training. flops: model FLOPs of a step over all
    ranks. average: seconds of a recent step, from which the time left is estimated.
    """
    iteration = metrics["iteration"]
    seconds = metrics["step_seconds"]
    left = timedelta(seconds=round((total - iteration) * average))
    if "grad_norm" in metrics:
        update = f"grad norm {metrics['grad_norm']:.3f}"
    else:
        update = "skipped"
    if "params_norm" in metrics:
        update += f" | params norm {metrics['params_norm']:.3f}"
    if "zeros_in_grad" in metrics:
        update += f" | zeros in grad {metrics['zeros_in_grad']}"
    if "loss_scale" in metrics:
        update += f" | loss scale {metrics['loss_scale']:g}"
    if "skipped_steps" in metrics:
        skipped = metrics["skipped_steps"]
        update += f" | {skipped} step{'' if skipped == 1 else 's'} skipped"
    if "global_batch_size" in metrics:
        update += f" | batch {metrics['global_batch_size']}"
    return (
        f"iteration {iteration:>{len(str(total))}}/{total} | {format_losses(losses)} | "
        f"lr {metrics['learning_rate']:.3e} | {update} | "
        f"{metrics['tokens_per_second']:,.0f} tokens/s | {flops / seconds / 1e12:.3f} TFLOP/s | "
        f"data {metrics['data_seconds'] / seconds:.1%} | left {left}"
    )
