"""A log or a metrics file that cannot be written does not end a training."""

import errno
import fcntl
import io
import json
import os
import signal
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from megalite.checkpoint.folder import latest_iteration
from megalite.training.metrics import MetricsFile
from megalite.training.output import failsafe_output
from tests.test_resume import MODEL, ROOT

FULL = Path("/dev/full")
needs_full_device = pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")


def command(folder: Path, *flags: str) -> list[str]:
    """pretrain_gpt.py with a line for each iteration, saving at the end."""
    flags = ("--log-interval", "1", "--save", str(folder / "saved"), *flags)
    return [sys.executable, str(ROOT / "pretrain_gpt.py"), *MODEL, *flags]


class Full(io.StringIO):
    """A stream on a disk that is full while `full` is set."""

    full = False

    def write(self, text: str) -> int:
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(text)


def test_a_stream_that_fails_is_reported_once_and_continues(monkeypatch):
    output, errors = Full(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", output)
    monkeypatch.setattr(sys, "stderr", errors)
    with failsafe_output(rank=3):
        print("one")
        output.full = True
        print("two", flush=True)
        print("three", flush=True)
        output.full = False
        print("four")
    assert sys.stdout is output and sys.stderr is errors
    assert output.getvalue() == "one\nfour\n"
    assert errors.getvalue().startswith(
        "rank 3: stdout cannot be written, training continues: No space left on device: "
    )
    assert errors.getvalue().count("\n") == 1


def test_both_streams_may_fail(monkeypatch):
    streams = {"stdout": Full(), "stderr": Full()}
    for name, stream in streams.items():
        stream.full = True
        monkeypatch.setattr(sys, name, stream)
    with failsafe_output(rank=0):
        print("lost")
        print("lost", file=sys.stderr)


def test_a_process_without_output(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    with failsafe_output(rank=0):
        print("lost")
    assert sys.stdout is None


def test_a_metrics_file_continues_once_its_disk_has_space(tmp_path, monkeypatch):
    """A line of which only a part could be written is cut off again."""
    reports: list[str] = []
    path = tmp_path / "m.jsonl"
    metrics = MetricsFile(str(path), reports.append)
    metrics.write(iteration=1)
    file = metrics._file

    class FullFile:
        """Takes three bytes, then no more."""

        name = str(path)
        space = 3

        def write(self, data: bytes) -> int:
            if not self.space:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            written = file.write(data[: self.space])
            self.space = 0
            return written

        def __getattr__(self, name: str):
            return getattr(file, name)

    monkeypatch.setattr(metrics, "_file", FullFile())
    metrics.write(iteration=2)
    metrics.write(iteration=3)
    monkeypatch.setattr(metrics, "_file", file)
    metrics.write(iteration=4)
    metrics.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"iteration": 1}, {"iteration": 4}]
    assert len(reports) == 2 and "m.jsonl: No space left on device" in reports[0]
    assert reports[1].endswith("m.jsonl: 2 lines were dropped")


@needs_full_device
def test_a_full_disk_under_the_log_or_the_metrics_file_ends_nothing(tmp_path):
    for name in ("stdout", "metrics"):
        flags = ["--metrics-file", str(FULL)] if name == "metrics" else []
        with open(FULL if name == "stdout" else tmp_path / "log", "w") as output:
            done = subprocess.run(
                command(tmp_path / name, *flags), stdout=output, stderr=subprocess.PIPE, text=True
            )
        said = done.stderr + (tmp_path / "log").read_text() if name == "metrics" else done.stderr
        assert done.returncode == 0, said
        assert said.count("No space left on device") == 1, said
        assert latest_iteration(tmp_path / name / "saved") == 12


def test_a_reader_of_the_log_that_ends_does_not_end_the_training(tmp_path):
    run = subprocess.Popen(
        command(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while "iteration  2/12" not in run.stdout.readline():
        assert run.poll() is None
    run.stdout.close()
    errors = run.stderr.read()
    assert run.wait() == 0, errors
    assert errors.count("stdout cannot be written, training continues: Broken pipe: ") == 1, errors
    assert latest_iteration(tmp_path / "saved") == 12


def test_a_closed_terminal_saves_and_stops(tmp_path):
    """The kernel sends SIGHUP, and every write to the terminal fails from then on."""
    terminal, device = os.openpty()

    def take_terminal() -> None:
        fcntl.ioctl(device, termios.TIOCSCTTY, 0)

    run = subprocess.Popen(
        command(tmp_path, "--train-iters", "100000"),
        stdin=device,
        stdout=device,
        stderr=device,
        start_new_session=True,
        preexec_fn=take_terminal,
    )
    os.close(device)
    said = b""
    while b"iteration      3/100000" not in said:
        said += os.read(terminal, 1 << 16)
    os.close(terminal)
    try:
        assert run.wait(timeout=120) == 0
    finally:
        run.kill()
    assert latest_iteration(tmp_path / "saved") >= 3


def test_nohup_trains_on(tmp_path):
    run = subprocess.Popen(
        command(tmp_path),
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    while "iteration  2/12" not in run.stdout.readline():
        assert run.poll() is None
    run.send_signal(signal.SIGHUP)
    assert "all 12 iterations are done" in run.communicate(timeout=120)[0]
