"""Which kernels there are, for people to read: `python -m megalite.kernels` and the line at the
start of a run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megalite.kernels import native

ROOT = Path(__file__).resolve().parents[2]


def report_lines(**environment: str) -> list[str]:
    run = subprocess.run(
        [sys.executable, "-m", "megalite.kernels"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


def test_the_report_says_what_there_is():
    lines = report_lines()
    assert lines == native.report()
    if native.MISSING:
        assert lines[0] == f"native kernels: none, {native.MISSING}"
        return
    assert lines[0].startswith("CPU:  native, ") and lines[1].startswith("CUDA: ")
    if torch.version.cuda is None:
        assert lines[1].endswith(f"torch {torch.__version__} is not a CUDA build")


def test_they_can_be_turned_off():
    assert (
        report_lines(MEGALITE_KERNELS="off")[0]
        == "native kernels: none, MEGALITE_KERNELS=off turns them off"
    )


@pytest.mark.parametrize("value", ["off", "0", "False", "no"])
def test_every_usual_no_turns_them_off(monkeypatch, value):
    monkeypatch.setenv(native.SWITCH, value)
    assert native._load() == f"MEGALITE_KERNELS={value} turns them off"


@pytest.mark.parametrize("value", ["on", "1", "of"])
def test_other_values_are_refused(monkeypatch, value):
    monkeypatch.setenv(native.SWITCH, value)
    with pytest.raises(ValueError, match=f"MEGALITE_KERNELS is '{value}': off, 0, false, no turn"):
        native._load()


def test_a_missing_or_broken_library_is_reported_and_nothing_fails(monkeypatch, tmp_path):
    monkeypatch.delenv(native.SWITCH, raising=False)
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "none.so")
    assert "not built" in native._load()
    (tmp_path / "broken.so").write_text("no library")
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "broken.so")
    assert "broken.so cannot be loaded, build it again" in native._load()


def test_the_status_is_one_line(monkeypatch):
    for missing in (None, "they were not built"):
        monkeypatch.setattr(native, "MISSING", missing)
        assert len(native.status().splitlines()) == 1
        assert ("no native ones: they were not built" in native.status()) == bool(missing)
