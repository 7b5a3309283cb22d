"""tools/plot_metrics.py: what it reads from metrics files, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megalite.programs.plot_metrics import MetricsError, PlotConfig, draw, read_curves

TOOL = Path(__file__).resolve().parents[1] / "tools/plot_metrics.py"


def write(path: Path, *lines: dict, end: str = "") -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + end)
    return path


def test_repeated_iterations_count_as_they_were_last(tmp_path):
    lines = [
        {"iteration": i, "loss": loss}
        for i, loss in [(1, 9.0), (2, 8.0), (3, 7.0), (2, 8.5), (3, 7.5)]
    ]
    path = write(
        tmp_path / "m.jsonl",
        *lines,
        {"iteration": 3, "validation_loss": 7.25},
        end='{"iteration": 4, "lo',
    )
    curves = read_curves(path)
    assert curves.training == [(1, 9.0), (2, 8.5), (3, 7.5)]
    assert curves.validation == [(3, 7.25)]


@pytest.mark.parametrize(
    "text, message",
    [
        ("nonsense\n", "line 1: not an object"),
        ("[1]\n3\n", "line 2: not an object"),
        ('{"iteration": 1, "loss": 2}\n{"loss": 2}\n', "line 2: not an object"),
        ('{"iteration": 1}\n', "no training or validation loss"),
        ("", "no training or validation loss"),
    ],
)
def test_bad_files_are_refused_with_the_line(tmp_path, text, message):
    path = tmp_path / "m.jsonl"
    path.write_text(text)
    with pytest.raises(MetricsError, match=message):
        read_curves(path)


def test_two_runs_and_a_resume_in_one_picture(tmp_path):
    a = write(tmp_path / "a.jsonl", *({"iteration": i, "loss": 9.0 - i} for i in range(5)))
    b = write(tmp_path / "b.jsonl", {"iteration": 2, "validation_loss": 7.0})
    plain, marked = tmp_path / "plain.svg", tmp_path / "marked.svg"
    draw(PlotConfig((a, b), plain), [read_curves(a), read_curves(b)])
    draw(PlotConfig((a, b), marked, resumed_at=("3",)), [read_curves(a), read_curves(b)])
    assert "<svg" in plain.read_text()
    assert "resumed at 3" in marked.read_text() and "resumed at 3" not in plain.read_text()


def test_a_missing_file_and_an_unknown_format_are_one_line(tmp_path):
    good = write(tmp_path / "m.jsonl", {"iteration": 1, "loss": 2.0})
    for arguments, message in [
        ((tmp_path / "absent.jsonl", "--output", tmp_path / "x.png"), "No such file"),
        ((good, "--output", tmp_path / "x.unknown"), "unknown"),
    ]:
        run = subprocess.run([sys.executable, TOOL, *arguments], capture_output=True, text=True)
        assert run.returncode == 1
        assert (
            run.stderr.startswith("error: ")
            and message in run.stderr
            and run.stderr.count("\n") == 1
        )
