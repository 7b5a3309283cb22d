"""setup.py: why kernels are not built is reported on stderr; nvcc is found where it is, and may
fail."""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parents[2]


def built(folder: Path, **environment: str) -> str:
    """What `setup.py -q build_ext` says on stderr."""
    shutil.copytree(
        ROOT / "megalite/kernels",
        folder / "megalite/kernels",
        ignore=shutil.ignore_patterns("*.so"),
        dirs_exist_ok=True,
    )
    shutil.copy(ROOT / "setup.py", folder)
    run = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=folder, env=os.environ | environment, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert not list(folder.rglob("*.so"))
    return run.stderr


def test_a_compiler_that_fails_is_reported(tmp_path):
    (tmp_path / "megalite/kernels").mkdir(parents=True)
    (tmp_path / "megalite/kernels/native_library.so").write_text(
        "of an older build, which must not stay"
    )
    output = built(tmp_path, CC="false", CXX="false")
    assert "megalite is built without native kernels: " in output and "false" in output


@pytest.mark.parametrize("problem", ["ImportError", "OSError"])
def test_a_missing_or_broken_torch_is_reported(tmp_path, problem):
    (tmp_path / "none/torch").mkdir(parents=True)
    (tmp_path / "none/torch/__init__.py").write_text(f"raise {problem}")
    output = built(tmp_path, PYTHONPATH=str(tmp_path / "none"))
    assert "megalite is built without native kernels: there is no torch" in output


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


@pytest.mark.parametrize("fails", ["nothing", "nvcc's answer", "nvcc", "linker"])
def test_the_cpu_part_is_built_when_the_cuda_part_fails(tmp_path, monkeypatch, capfd, fails):
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.chdir(ROOT)
    code = runpy.run_path("setup.py")
    built = []

    def find(version):
        if fails == "nvcc's answer":
            raise AttributeError("no TOP")
        return "nvcc", Path("lib64")

    def compile(self, command):
        if fails == "nvcc":
            raise RuntimeError("nvcc stopped")

    def build(self, extension):
        if fails == "linker" and extension.extra_objects:
            raise RuntimeError("cudart_static not found")
        built.append(
            bool(extension.extra_objects and ("MEGALITE_CUDA", None) in extension.define_macros)
        )

    scope = code["BuildKernels"].build_extension.__globals__
    monkeypatch.setitem(scope, "cuda_compiler", find)
    monkeypatch.setitem(scope, "cuda_flags", lambda nvcc: [])
    monkeypatch.setattr(build_ext, "spawn", compile)
    monkeypatch.setattr(build_ext, "build_extension", build)
    command = code["BuildKernels"](setuptools.Distribution())
    command.build_temp = str(tmp_path)
    extension = setuptools.Extension("megalite.kernels.native_library", [])
    extension.cuda = "13.0"
    command.build_extension(extension)
    assert built == [fails == "nothing"]
    assert ("built without its CUDA part" in capfd.readouterr().err) == (fails != "nothing")
