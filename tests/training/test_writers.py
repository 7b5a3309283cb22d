"""TensorBoard and Weights & Biases: curves that continue after a stop, and writers that fail."""

import gzip
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megalite.checkpoint.fence import Lease
from megalite.checkpoint.folder import CheckpointError
from megalite.config import cli, validate
from megalite.config.run import from_flat
from megalite.parallel.context import ParallelContext
from megalite.training import loop, writers
from megalite.training.build import build_model
from megalite.training.loop import Trainer
from megalite.training.metrics import training_line
from megalite.training.pretrain import pretrain
from megalite.training.signals import StopSignals
from megalite.training.state import Progress
from megalite.training.writers import BackgroundWriter, Writers, tracking_writers
from tests.runs import ALONE, working_in
from tests.test_resume import MODEL, ROOT, resumable
from tests.test_resume import pretrain_on_rank as train
from tests.wandb_files import history


def logged(folder: Path, name: str) -> list[tuple[int, float]]:
    """The points of a curve in the metrics file."""
    entries = map(json.loads, (folder / "m.jsonl").read_text().splitlines())
    return [(entry["iteration"], entry[name]) for entry in entries if name in entry]


@pytest.fixture(scope="module")
def stopped_and_resumed(tmp_path_factory) -> tuple[Path, list[str]]:
    """A run that stopped at iteration 5, was started from iteration 3 again, and ran to its end."""
    folder = tmp_path_factory.mktemp("tracked")
    flags = [
        *map(str, resumable(folder)),
        "--tensorboard-dir",
        str(folder / "board"),
        "--wandb-project",
        "demo",
    ]
    with working_in(folder):
        train(ALONE, [*flags, "--save-interval", "3", "--exit-interval", "5"])
        latest = folder / "c" / "latest_checkpointed_iteration.txt"
        latest.write_text("3")  # as if it had been killed between the saves
        train(ALONE, flags)
    return folder


def test_tensorboard_hides_what_the_killed_run_wrote_after_its_checkpoint(stopped_and_resumed):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(stopped_and_resumed / "board")).Reload()
    points = [(event.step, event.value) for event in board.Scalars("loss")]
    wanted = logged(stopped_and_resumed, "loss")
    assert [step for step, _ in points] == list(range(1, 13))
    assert [value for _, value in points] == pytest.approx(
        [value for _, value in wanted[:3] + wanted[5:]], rel=1e-6
    )
    assert [event.step for event in board.Scalars("validation_loss")] == [4, 8, 12]


def test_wandb_continues_the_same_run(stopped_and_resumed):
    """Two offline records of one id; together they hold the rows of the metrics file."""
    files = sorted(stopped_and_resumed.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2 and len({file.name for file in files}) == 1
    rows = [row for file in files for row in history(file)]
    points = [(row["iteration"], row["loss"]) for row in rows if "loss" in row]
    assert points == logged(stopped_and_resumed, "loss") and len(points) == 14
    assert "validation_loss" in rows[-1]


class Broken:
    """A writer whose disk fills up at the second row, and that hangs when it is closed."""

    rows = 0

    def write(self, **values: float) -> None:
        self.rows += 1
        if self.rows == 2:
            raise OSError("disk full")

    def close(self) -> None:
        raise AssertionError("a writer that failed is not closed")


def test_a_writer_that_fails_gets_no_more_numbers():
    reports: list[str] = []
    writer = Broken()
    background = BackgroundWriter("The board", lambda: writer, reports.append)
    for iteration in range(4):
        background.write(iteration=iteration)
    background.close()
    assert writer.rows == 2 and reports == ["The board gets no more numbers: OSError: disk full"]


def test_a_writer_that_hangs_delays_nothing(monkeypatch):
    """Nor at the end, nor while it is made; what the queue has no room for is dropped."""
    monkeypatch.setattr(writers, "QUEUE_SIZE", 3)
    reports: list[str] = []
    never = threading.Event()
    background = BackgroundWriter("The board", never.wait, reports.append, timeout=0.1)
    for iteration in range(5):
        background.write(iteration=iteration)
    background.close()
    assert reports == [
        "The board: not all was sent within 0.1 s",
        "The board did not keep up: the numbers of 2 iterations were dropped",
    ]
    never.set()


def test_a_slow_end_of_the_writers_is_no_hang(monkeypatch):
    """The other ranks wait for rank 0: two writers take half of --hang-timeout at most."""
    never, reports = threading.Event(), []
    monkeypatch.setattr(writers, "TensorBoardWriter", lambda *_: never.wait())
    monkeypatch.setattr(writers, "WandbWriter", lambda *_: never.wait())
    flags = {"hang_timeout": 0.4, "tensorboard_dir": "board", "wandb_project": "demo"}
    Writers(*tracking_writers(from_flat(flags), 0, reports.append)).close()
    assert reports == [
        f"{name}: not all was sent within 0.1 s" for name in ("TensorBoard", "Weights & Biases")
    ]
    never.set()


def test_a_training_continues_without_its_tracking_writers(tmp_path):
    """No key for Weights & Biases, and a file where TensorBoard's folder should be."""
    (tmp_path / "file").write_text("")
    tracked = ["--wandb-project", "demo", "--tensorboard-dir", "file", "--exit-interval", "1"]
    variables = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    done = subprocess.run(
        [sys.executable, ROOT / "pretrain_gpt.py", *MODEL, *tracked],
        cwd=tmp_path,
        env=variables | {"WANDB_MODE": "online", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "TensorBoard gets no more numbers: FileExistsError" in done.stdout
    assert (
        "Weights & Biases gets no more numbers: " in done.stdout
        and "stopped at iteration 1" in done.stdout
    )


WITHOUT = """
import sys
for name in ("wandb", "tensorboard"):
    sys.modules[name] = None
from megalite.config.cli import parse_and_check
parse_and_check(sys.argv[1:])
"""


def test_missing_libraries_are_one_problem_each_before_the_start():
    flags = [*MODEL, "--wandb-project", "demo", "--tensorboard-dir", "board"]
    done = subprocess.run([sys.executable, "-c", WITHOUT, *flags], capture_output=True, text=True)
    assert done.returncode == 2 and "2 problems" in done.stderr
    for text in (
        "--wandb-project demo needs the library wandb",
        "--tensorboard-dir board needs",
        "megalite[tracking]",
    ):
        assert text in done.stderr


def test_profile_traces_hold_the_iterations_asked_for(tmp_path):
    with working_in(tmp_path):
        train(ALONE, ["--profile", "2-3,5-5", "--exit-interval", "6"])
    files = list((tmp_path / "profile").iterdir())
    assert sorted(path.name for path in files) == [
        "iteration-2-rank-00000.trace.json.gz", "iteration-5-rank-00000.trace.json.gz",
    ]  # fmt: skip
    events = [
        json.loads(gzip.decompress(data))["traceEvents"]
        for data in map(Path.read_bytes, sorted(files))
    ]
    two, one = (
        sum(event.get("name", "").startswith("Optimizer.step") for event in trace)
        for trace in events
    )
    assert (two, one) == (2, 1)


def train_with_a_profile(launch, folder: Path) -> str:
    with working_in(folder):
        return train(launch, ["--profile", "2-3", "--exit-interval", "4", "--hang-timeout", "2"])


def test_a_profile_that_takes_long_to_write_is_no_hang(pool, tmp_path):
    """Of rank 0; rank 1 waits for it. It goes to a pipe that is read late."""
    (tmp_path / "profile").mkdir()
    pipe = tmp_path / "profile" / "iteration-2-rank-00000.trace.json.gz"
    os.mkfifo(pipe)
    read: list[bytes] = []

    def read_late():
        with open(pipe, "rb") as file:
            time.sleep(4)
            read.append(file.read())

    reader = threading.Thread(target=read_late, daemon=True)
    reader.start()
    printed, _ = pool.run(train_with_a_profile, 2, tmp_path, timeout=100)
    reader.join()
    assert (
        "stopped at iteration 4" in printed and json.loads(gzip.decompress(read[0]))["traceEvents"]
    )


def test_a_profile_that_cannot_be_written_ends_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    with working_in(tmp_path):
        printed = train(
            ALONE, ["--profile", "2-3,5-9", "--profile-dir", "file/profile", "--exit-interval", "6"]
        )
    assert printed.count("rank 0: a profile was not written: [Errno 20] Not a directory") == 2
    assert "stopped at iteration 6" in printed


def test_why_a_profile_cannot_be_written(tmp_path):
    """That its folder cannot be made, not that it is missing then."""
    (tmp_path / "gone").symlink_to("nowhere")
    with working_in(tmp_path):
        printed = train(
            ALONE, ["--profile", "2-2", "--profile-dir", "gone", "--exit-interval", "2"]
        )
    assert "a profile was not written: [Errno 17] File exists: 'gone'" in printed


def test_phases_make_up_the_step(tmp_path):
    with working_in(tmp_path):
        train(ALONE, ["--metrics-file", "m.jsonl", "--exit-interval", "3"])
    for line in (tmp_path / "m.jsonl").read_text().splitlines():
        entry = json.loads(line)
        phases = [
            entry[f"{name}_seconds"]
            for name in ("data", "forward", "backward", "communication", "optimizer")
        ]
        assert all(seconds >= 0 for seconds in phases) and min(phases[1:3]) > 0 and phases[3] == 0
        assert sum(phases) <= entry["step_seconds"]


def test_on_a_gpu_phases_are_reported_where_they_were_timed():
    """The host waits for the GPU in iterations that have a console line; the last one has."""
    config = from_flat({"train_iters": 7, "log_interval": 3})
    timed = {}
    for device in ("cpu", "cuda"):
        context = replace(ParallelContext.single(), device=torch.device(device))
        trainer = Trainer(
            config=config,
            context=context,
            components=None,
            progress=Progress(),
            train_data=None,
            validation_data=None,
            metrics=Writers(),
            signals=StopSignals(),
            log=print,
        )
        timed[device] = [iteration for iteration in range(1, 8) if trainer.times_phases(iteration)]
    assert timed == {"cpu": [1, 2, 3, 4, 5, 6, 7], "cuda": [3, 6, 7]}


def test_a_run_that_was_replaced_ends_soon(tmp_path, monkeypatch):
    """Before it saves again or adds to the metrics file, which its successor writes as well."""
    monkeypatch.setattr(loop, "LEASE_CHECK_SECONDS", 0.0)

    def build_replaced(*args):
        def replace_at_step_3(*unused):
            if args[1].activity.step == 3:
                Lease.take(tmp_path / "c")

        model = build_model(*args)
        model.stages[-1].register_forward_pre_hook(replace_at_step_3)
        return model

    config = validate.resolve(cli.read_config([*MODEL, *map(str, resumable(tmp_path))]), 1)
    with pytest.raises(CheckpointError, match="c now belongs to another run"):
        pretrain(config, ALONE, build_replaced)
    assert [iteration for iteration, _ in logged(tmp_path, "loss")] == [1, 2]


def test_the_console_counts_skipped_steps():
    numbers = dict(iteration=3, step_seconds=1.0, data_seconds=0.0, learning_rate=1e-3)
    numbers |= dict(tokens_per_second=1.0)
    for skipped, words in ((0, "0 steps skipped"), (1, "1 step skipped"), (2, "2 steps skipped")):
        metrics = numbers | {"skipped_steps": skipped}
        line = training_line(metrics, {"loss": 1.0}, total=9, flops=1.0, average=1.0)
        assert f" | {words} | " in line
