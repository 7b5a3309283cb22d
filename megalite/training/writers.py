"""Where a run's numbers go besides the metrics file: TensorBoard and Weights & Biases.

Neither can end or delay a training.
"""

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
from megalite.system.errors import error_message
from megalite.training.output import Log

CLOSE_SECONDS = 60.0
"""How long the end of a run waits for a writer to send its last numbers."""
QUEUE_SIZE = 10_000
"""Iterations whose numbers may wait for a writer: hours of most trainings, and some MB."""
RUN_ID_FILE = "wandb-run-id.txt"


class Writer(Protocol):
    """Takes the numbers of an iteration, of which one is `iteration`."""

    def write(self, **values: float) -> None:
        """Add one set of numbers."""

    def close(self) -> None:
        """Write what is buffered; nothing more will come."""


class TensorBoardWriter:
    """Event files in a folder, from the iteration after `iteration` on.

    Points that an earlier run wrote after that iteration are hidden: it was stopped after it had
    saved the checkpoint from which this run resumes.
    """

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
    """A run of Weights & Biases.

    Its id is stored in --save, so that a resumed run continues the same curves. These are drawn
    over `iteration`, since wandb's own step count cannot go back.
    """

    def __init__(self, config: RunConfig):
        import wandb

        settings = wandb.Settings(console="off", silent=True)
        # wandb 0.18 does not have it: there the end of the process waits without a limit.
        if hasattr(settings, "finish_timeout"):
            settings.finish_timeout = CLOSE_SECONDS
        # Named explicitly: otherwise wandb keeps the folder of an earlier run of this process.
        folder = os.path.abspath(os.environ.get("WANDB_DIR", os.curdir))
        self._run = wandb.init(
            dir=folder,
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
    """The id that the first run stored in --save, or a new one."""
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
    """Runs a writer on a thread of its own, where it can neither delay nor end the training.

    `make` creates the writer, on that thread. The first failure is reported in a line, and the
    writer gets no more numbers. Numbers that it does not keep up with are dropped.
    """

    def __init__(
        self, name: str, make: Callable[[], Writer], report: Log, timeout: float = CLOSE_SECONDS
    ):
        self._name = name
        self._report = report
        self._timeout = timeout
        self._dropped = 0
        self._queue: queue.Queue[dict[str, float] | None] = queue.Queue(QUEUE_SIZE)
        self._thread = threading.Thread(target=self._serve, args=(make,), name=name, daemon=True)
        self._thread.start()

    def write(self, **values: float) -> None:
        """Queue the numbers, and return at once."""
        try:
            self._queue.put_nowait(values)
        except queue.Full:
            self._dropped += 1

    def close(self) -> None:
        """Wait until all is written, `timeout` seconds at most. Reports how much was dropped."""
        end = time.monotonic() + self._timeout
        with suppress(queue.Full):
            self._queue.put(None, timeout=self._timeout)
        self._thread.join(max(0.0, end - time.monotonic()))
        if self._thread.is_alive():
            self._report(f"{self._name}: not all was sent within {self._timeout:g} s")
        if self._dropped:
            lost = f"the numbers of {self._dropped} iterations were dropped"
            self._report(f"{self._name} did not keep up: {lost}")

    def _serve(self, make: Callable[[], Writer]) -> None:
        rows = iter(self._queue.get, None)
        try:
            writer = make()
            for values in rows:
                writer.write(**values)
            writer.close()
        except (Exception, SystemExit) as error:  # whatever it is, the training is worth more
            problem = f"{type(error).__name__}: {error_message(error)}"
            self._report(f"{self._name} gets no more numbers: {problem}")
            for _ in rows:
                pass


class Writers:
    """Several writers as one."""

    def __init__(self, *writers: Writer):
        self._writers = writers

    def write(self, **values: float) -> None:
        """Pass the numbers to each writer, in order. Raises what a writer raises."""
        for writer in self._writers:
            writer.write(**values)

    def close(self) -> None:
        """Close all of them."""
        for writer in self._writers:
            writer.close()


def tracking_writers(config: RunConfig, iteration: int, report: Log) -> list[Writer]:
    """The writers besides the metrics file, for a run that continues after `iteration`."""
    training = config.training
    makers: dict[str, Callable[[], Writer]] = {}
    if training.tensorboard_dir is not None:
        # Absolute: the thread may make it after the process has changed its folder.
        folder = os.path.abspath(training.tensorboard_dir)
        makers["TensorBoard"] = lambda: TensorBoardWriter(folder, iteration)
    if training.wandb_project is not None:
        makers["Weights & Biases"] = lambda: WandbWriter(config)
    # The other ranks wait while writers close: two writers together must not look like a hang.
    timeout = CLOSE_SECONDS
    if config.parallel.hang_timeout:
        timeout = min(timeout, config.parallel.hang_timeout / 4)
    return [BackgroundWriter(name, make, report, timeout) for name, make in makers.items()]
