"""setup.py: why kernels are not built is told on stderr; nvcc is found where it is."""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).resolve().parents[2]


def built(folder: Path, **environment: str) -> str:
    """What `setup.py -q build_ext` says on stderr."""
    shutil.copytree(ROOT / "megalite/kernels", folder / "megalite/kernels", ignore=shutil.ignore_patterns("*.so"))
    shutil.copy(ROOT / "setup.py", folder)
    run = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=folder, env=os.environ | environment, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert not list(folder.rglob("*.so"))
    return run.stderr


def test_a_compiler_that_fails_is_told(tmp_path):
    told = built(tmp_path, CC="false", CXX="false")
    assert "megalite is built without native kernels: " in told and "false" in told


def test_a_missing_torch_is_told(tmp_path):
    (tmp_path / "none/torch").mkdir(parents=True)
    (tmp_path / "none/torch/__init__.py").write_text("raise ImportError")
    told = built(tmp_path, PYTHONPATH=str(tmp_path / "none"))
    assert "megalite is built without native kernels: there is no torch" in told


@pytest.mark.parametrize("home", [None, "empty", "full"])
def test_nvcc_is_that_of_cuda_home_or_else_that_in_the_path(tmp_path, monkeypatch, home):
    for folder in ("full/bin", "path"):
        nvcc = tmp_path / folder / "nvcc"
        nvcc.parent.mkdir(parents=True)
        nvcc.write_text(f"#!/bin/sh\necho release 13.0\necho '#$ TOP={tmp_path}/{folder}' >&2\n")
        nvcc.chmod(0o755)
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PATH", f"{tmp_path}/path:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    if home:
        monkeypatch.setenv("CUDA_HOME", str(tmp_path / home))
    compiler = runpy.run_path("setup.py")["cuda_compiler"]
    expected = "full/bin" if home == "full" else "path"
    assert compiler("13.0") == (f"{tmp_path}/{expected}/nvcc", tmp_path / expected / "lib64")
    assert compiler("12.8") is None and compiler(None) is None
