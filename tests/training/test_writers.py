"""TensorBoard and Weights & Biases: curves that go on after a stop, and writers that fail."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megalite.training.writers import Harmless
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
    folder = tmp_path_factory.mktemp("watched")
    flags = [*map(str, resumable(folder)), "--tensorboard-dir", str(folder / "board"), "--wandb-project", "demo"]
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
    assert [value for _, value in points] == pytest.approx([value for _, value in wanted[:3] + wanted[5:]], rel=1e-6)
    assert [event.step for event in board.Scalars("validation_loss")] == [4, 8, 12]


def test_wandb_goes_on_with_the_same_run(stopped_and_resumed):
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


def test_a_writer_that_fails_is_left_alone():
    said: list[str] = []
    writer = Broken()
    harmless = Harmless("The board", lambda: writer, said.append)
    for iteration in range(4):
        harmless.write(iteration=iteration)
    harmless.close()
    assert writer.rows == 2 and said == ["The board gets no more numbers: OSError: disk full"]


def test_a_training_goes_on_without_its_watchers(tmp_path):
    """No key for Weights & Biases, and a file where TensorBoard's folder should be."""
    (tmp_path / "file").write_text("")
    watched = ["--wandb-project", "demo", "--tensorboard-dir", "file", "--exit-interval", "1"]
    variables = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    done = subprocess.run(
        [sys.executable, ROOT / "pretrain_gpt.py", *MODEL, *watched],
        cwd=tmp_path, env=variables | {"WANDB_MODE": "online", "HOME": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "TensorBoard gets no more numbers: FileExistsError" in done.stdout
    assert "Weights & Biases gets no more numbers: " in done.stdout and "stopped at iteration 1" in done.stdout


WITHOUT = """
import sys
for name in ("wandb", "tensorboard"):
    sys.modules[name] = None
from megalite.cli import parse_and_check
parse_and_check(sys.argv[1:])
"""


def test_missing_libraries_are_one_problem_each_before_the_start():
    flags = [*MODEL, "--wandb-project", "demo", "--tensorboard-dir", "board"]
    done = subprocess.run([sys.executable, "-c", WITHOUT, *flags], capture_output=True, text=True)
    assert done.returncode == 2 and "2 problems" in done.stderr
    for text in ("--wandb-project demo needs the library wandb", "--tensorboard-dir board needs", "megalite[watch]"):
        assert text in done.stderr


def test_profile_traces_hold_the_iterations_asked_for(tmp_path):
    with working_in(tmp_path):
        train(ALONE, ["--profile", "2-3,5-5", "--exit-interval", "6"])
    files = list((tmp_path / "profile").iterdir())
    assert sorted(path.name for path in files) == [
        "iteration-2-rank-00000.trace.json.gz", "iteration-5-rank-00000.trace.json.gz",
    ]  # fmt: skip
    events = [json.loads(gzip.decompress(data))["traceEvents"] for data in map(Path.read_bytes, sorted(files))]
    two, one = (sum(event.get("name", "").startswith("Optimizer.step") for event in trace) for trace in events)
    assert (two, one) == (2, 1)


def test_phases_make_up_the_step(tmp_path):
    with working_in(tmp_path):
        train(ALONE, ["--metrics-file", "m.jsonl", "--exit-interval", "3"])
    for line in (tmp_path / "m.jsonl").read_text().splitlines():
        entry = json.loads(line)
        phases = [entry[f"{name}_seconds"] for name in ("data", "forward", "backward", "communication", "optimizer")]
        assert all(seconds >= 0 for seconds in phases) and min(phases[1:3]) > 0 and phases[3] == 0
        assert sum(phases) <= entry["step_seconds"]
