"""Where a run's numbers go besides the metrics file: TensorBoard and Weights & Biases. Neither may stop a training."""

import os
import queue
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from megalite.config.run import RunConfig, to_flat

CLOSE_SECONDS = 60.0
"""A writer that has not sent its last numbers by then is left behind."""
MOST_WAITING = 10_000
"""Iterations whose numbers may wait for a writer: hours of most trainings, and some MB."""
RUN_ID_FILE = "wandb-run-id.txt"


class Writer(Protocol):
    """Takes the numbers of an iteration, of which one is `iteration`."""

    def write(self, **values: float) -> None:
        """Add one set of numbers."""

    def close(self) -> None:
        """Nothing more will come."""


class TensorBoardWriter:
    """Event files in a folder. What a killed run wrote after the checkpoint that this one goes on from is hidden."""

    def __init__(self, folder: str, iteration: int):
        from torch.utils.tensorboard import SummaryWriter

        self._events = SummaryWriter(folder, purge_step=iteration + 1)

    def write(self, iteration: int, **values: float) -> None:
        """Add a point to the curve of each name."""
        for name, value in values.items():
            self._events.add_scalar(name, value, iteration)

    def close(self) -> None:
        """Write what is buffered."""
        self._events.close()


class WandbWriter:
    """A run of Weights & Biases. Its id lies in --save, so that a run that resumes goes on with the same curves; they
    are drawn over `iteration`, since wandb's own steps cannot go back."""

    def __init__(self, config: RunConfig):
        import wandb

        settings = wandb.Settings(console="off", silent=True)
        if hasattr(
            settings, "finish_timeout"
        ):  # newer than 0.18; else the end of the process waits without a limit
            settings.finish_timeout = CLOSE_SECONDS
        self._run = wandb.init(
            dir=os.path.abspath(
                os.environ.get("WANDB_DIR", os.curdir)
            ),  # wandb keeps the one of an earlier run else
            project=config.training.wandb_project,
            name=config.training.wandb_exp_name,
            id=_run_id(config.checkpoint.save),
            resume="allow",
            config=to_flat(config),
            settings=settings,
        )
        self._run.define_metric("*", step_metric="iteration")

    def write(self, **values: float) -> None:
        """Queue one row."""
        self._run.log(values)

    def close(self) -> None:
        """Send what is queued."""
        self._run.finish()


def _run_id(save: str | None) -> str:
    """The id that the first run left in --save, or a new one."""
    new = uuid.uuid4().hex[:8]
    if save is None:
        return new
    file = Path(save) / RUN_ID_FILE
    if file.exists():
        return file.read_text().strip()
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f".{RUN_ID_FILE}.{new}")
    draft.write_text(new + "\n")
    os.replace(draft, file)
    return new


class BackgroundWriter:
    """A writer on a thread of its own, which can neither hold up nor end a training: its first failure is told in a
    line, and it gets no more numbers; what it cannot keep up with is dropped. `make` makes it, on that thread. It gets
    `patience` seconds at the end."""

    def __init__(
        self,
        name: str,
        make: Callable[[], Writer],
        say: Callable[[str], None],
        patience: float = CLOSE_SECONDS,
    ):
        self._name, self._say, self._patience, self._dropped = name, say, patience, 0
        self._queue: queue.Queue[dict[str, float] | None] = queue.Queue(MOST_WAITING)
        self._thread = threading.Thread(target=self._serve, args=(make,), name=name, daemon=True)
        self._thread.start()

    def write(self, **values: float) -> None:
        """Hand the numbers over, and go on."""
        try:
            self._queue.put_nowait(values)
        except queue.Full:
            self._dropped += 1

    def close(self) -> None:
        """Wait until all is written, but not for ever. Says how much was dropped."""
        end = time.monotonic() + self._patience
        with suppress(queue.Full):
            self._queue.put(None, timeout=self._patience)
        self._thread.join(max(0.0, end - time.monotonic()))
        if self._thread.is_alive():
            self._say(f"{self._name}: not all was sent within {self._patience:g} s")
        if self._dropped:
            self._say(
                f"{self._name} did not keep up: the numbers of {self._dropped} iterations were dropped"
            )

    def _serve(self, make: Callable[[], Writer]) -> None:
        rows = iter(self._queue.get, None)
        try:
            writer = make()
            for values in rows:
                writer.write(**values)
            writer.close()
        except (Exception, SystemExit) as error:  # whatever it is, the training is worth more
            self._say(f"{self._name} gets no more numbers: {type(error).__name__}: {error}")
            for _ in rows:
                pass


class Writers:
    """Several writers as one."""

    def __init__(self, *writers: Writer):
        self._writers = writers

    def write(self, **values: float) -> None:
        """Pass the numbers to each, in order. Raises what a writer raises."""
        for writer in self._writers:
            writer.write(**values)

    def close(self) -> None:
        """Close all."""
        for writer in self._writers:
            writer.close()


def tracking_writers(config: RunConfig, iteration: int, say: Callable[[str], None]) -> list[Writer]:
    """The writers that the configuration asks for besides the metrics file, of a run that goes on after `iteration`."""
    training, writers, timeout = config.training, [], config.parallel.hang_timeout
    # The other ranks wait for it meanwhile: both writers together must not look like a hang.
    patience = min(CLOSE_SECONDS, timeout / 4) if timeout else CLOSE_SECONDS
    if training.tensorboard_dir is not None:
        folder = os.path.abspath(training.tensorboard_dir)
        writers.append(
            BackgroundWriter(
                "TensorBoard", lambda: TensorBoardWriter(folder, iteration), say, patience
            )
        )
    if training.wandb_project is not None:
        writers.append(
            BackgroundWriter("Weights & Biases", lambda: WandbWriter(config), say, patience)
        )
    return writers
