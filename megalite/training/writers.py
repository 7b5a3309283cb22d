"""Where a run's numbers go besides the metrics file: TensorBoard and Weights & Biases. Neither may stop a training."""

import os
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from megalite.config import RunConfig, to_flat

CLOSE_SECONDS = 60.0
"""A writer that has not sent its last numbers by then is left behind."""
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

        save, run_id = config.checkpoint.save, uuid.uuid4().hex[:8]
        if save is not None:
            file = Path(save) / RUN_ID_FILE
            file.parent.mkdir(parents=True, exist_ok=True)
            run_id = file.read_text().strip() if file.exists() else run_id
            file.write_text(run_id + "\n")
        self._run = wandb.init(
            dir=os.path.abspath(os.environ.get("WANDB_DIR", os.curdir)),  # wandb keeps the one of an earlier run else
            project=config.training.wandb_project, name=config.training.wandb_exp_name, id=run_id, resume="allow",
            config=to_flat(config), settings=wandb.Settings(console="off", silent=True),
        )  # fmt: skip
        self._run.define_metric("*", step_metric="iteration")

    def write(self, **values: float) -> None:
        """Queue one row."""
        self._run.log(values)

    def close(self) -> None:
        """Send what is queued."""
        self._run.finish()


class Harmless:
    """A writer that may fail: its first failure is told in a line, and it gets no more numbers. `make` makes it."""

    def __init__(self, name: str, make: Callable[[], Writer], say: Callable[[str], None]):
        self._name, self._say, self._writer = name, say, None
        self._try(lambda: setattr(self, "_writer", make()))

    def write(self, **values: float) -> None:
        """Pass the numbers on, if the writer still works."""
        if self._writer is not None:
            self._try(lambda: self._writer.write(**values))

    def close(self) -> None:
        """Close the writer, but wait no longer than a minute."""
        if self._writer is not None:
            closing = threading.Thread(target=self._try, args=(self._writer.close,), daemon=True)
            closing.start()
            closing.join(CLOSE_SECONDS)
            if closing.is_alive():
                self._say(f"{self._name}: not all was sent within {CLOSE_SECONDS:.0f} s")

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except (Exception, SystemExit) as error:  # whatever it is, the training is worth more
            self._writer = None
            self._say(f"{self._name} gets no more numbers: {type(error).__name__}: {error}")


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


def watching_writers(config: RunConfig, iteration: int, say: Callable[[str], None]) -> list[Writer]:
    """The writers that the configuration asks for besides the metrics file, of a run that goes on after `iteration`."""
    training, writers = config.training, []
    if training.tensorboard_dir is not None:
        folder = os.path.abspath(training.tensorboard_dir)
        writers.append(Harmless("TensorBoard", lambda: TensorBoardWriter(folder, iteration), say))
    if training.wandb_project is not None:
        writers.append(Harmless("Weights & Biases", lambda: WandbWriter(config), say))
    return writers
