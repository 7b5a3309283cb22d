"""What a run says about itself: a line on the console, and one JSON object a line in the metrics file."""

import json
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path


class MetricsFile:
    """Appends JSON lines as they happen, with full float precision. With no path it does nothing.

    Raises OSError, with the path, when the file cannot be written.
    """

    def __init__(self, path: str | None):
        self._file = None
        if path:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "ab+", buffering=0)
            self._drop_torn_line()

    def _drop_torn_line(self) -> None:
        """Cut off a last line without an end, left by a full disk or a power failure: it would spoil the next one."""
        size = self._file.seek(0, 2)
        start = max(0, size - (1 << 16))
        self._file.seek(start)
        tail = self._file.read(size - start)
        if tail and not tail.endswith(b"\n"):
            self._file.truncate(start + tail.rfind(b"\n") + 1)

    def write(self, **values) -> None:
        """Append one object. Values are numbers; a line is complete before the next step starts."""
        if self._file:
            try:
                self._file.write(json.dumps(values).encode() + b"\n")
            except OSError as error:
                raise OSError(error.errno, error.strerror, self._file.name) from None

    def close(self) -> None:
        """Close the file."""
        if self._file:
            self._file.close()


def by_name(names: Sequence[str], terms: Sequence[float]) -> dict[str, float]:
    """The terms of a loss by their names, after their sum under the name `loss`, which a single term may have."""
    return {"loss": sum(terms), **dict(zip(names, terms))}


def in_words(losses: dict[str, float]) -> str:
    """Losses by name, for the console."""
    return " | ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in losses.items())


def training_line(
    metrics: dict, losses: dict[str, float], train_iters: int, flops: float, average_seconds: float
) -> str:
    """One line for the console. `losses` are those of `by_name`; `flops` are model FLOPs of a step over all ranks;
    `average_seconds` a recent step's."""
    iteration, seconds = metrics["iteration"], metrics["step_seconds"]
    left = timedelta(seconds=round((train_iters - iteration) * average_seconds))
    return (
        f"iteration {iteration:>{len(str(train_iters))}}/{train_iters} | {in_words(losses)} | "
        f"lr {metrics['learning_rate']:.3e} | grad norm {metrics['grad_norm']:.3f} | "
        f"{metrics['tokens_per_second']:,.0f} tokens/s | {flops / seconds / 1e12:.3f} TFLOP/s | "
        f"data {metrics['data_seconds'] / seconds:.1%} | left {left}"
    )
