"""The package as it is installed: what it holds, what it needs, and that it builds with and without
a compiler."""

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import megalite
from megalite.programs.main import PROGRAMS as COMMANDS

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text()
SOURCES = sorted((ROOT / "megalite").rglob("*.py"))
FILES = {*(str(path.relative_to(ROOT)) for path in SOURCES), "megalite/programs/supervise.sh"}
"""What a wheel holds without native kernels."""
PROGRAMS = [
    "pretrain_gpt.py",
    *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "tools").glob("*.py"))),
]


def requirements(name: str) -> set[str]:
    """Names of the distributions in a list of pyproject.toml (tomllib is not in Python 3.10)."""
    body = re.search(rf"^{name} = \[(.*?)\]$", PYPROJECT, re.M | re.S).group(1)
    return set(re.findall(r'"([\w-]+)', body))


def third_party_imports(path: Path, everywhere: bool) -> set[str]:
    """Distributions that a module imports from outside: at its top level, or everywhere in it."""
    tree = ast.parse(path.read_text())
    names = set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return {
        "pyyaml" if name == "yaml" else name
        for name in names - sys.stdlib_module_names - {"megalite"}
    }


def test_what_loading_megalite_needs_is_required():
    needed = set().union(*(third_party_imports(path, everywhere=False) for path in SOURCES))
    assert needed <= requirements("dependencies")


def test_whatever_else_is_imported_has_an_extra():
    used = set().union(*(third_party_imports(path, everywhere=True) for path in SOURCES))
    used.discard("apex")  # NVIDIA's is built from source; the package of this name is another one
    assert used <= set().union(
        *map(requirements, ("dependencies", "tokenizers", "data", "deepspeed", "plot", "tracking"))
    )


def test_nothing_is_required_that_is_not_used():
    used = set().union(*(third_party_imports(path, everywhere=True) for path in SOURCES))
    assert requirements("dependencies") <= used


def test_torch_is_pinned_in_one_place():
    names = subprocess.run(
        [
            "grep",
            "-rlE",
            "torch==[0-9]",
            ".",
            "--exclude-dir=.venv",
            "--exclude-dir=.git",
            "--exclude-dir=runs",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    ).stdout.split()
    assert names == ["./constraints.txt"]


def build_wheel(source: Path, out: Path, **environment: str) -> zipfile.ZipFile:
    """megalite's wheel, built in this environment from a copy of what it is built from."""
    shutil.copytree(
        ROOT / "megalite", source / "megalite", ignore=shutil.ignore_patterns("__pycache__", "*.so")
    )
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--no-deps",
            "--no-build-isolation",
            "--wheel-dir",
            out,
            source,
        ],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:]
    return zipfile.ZipFile(next(out.glob("megalite-*.whl")))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """megalite's wheel, built where there is no compiler."""
    return build_wheel(
        tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel"), CC="false", CXX="false"
    )


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
def test_with_a_compiler_one_wheel_has_the_kernels_for_all_pythons(tmp_path):
    wheel = build_wheel(tmp_path / "source", tmp_path / "out")
    assert "-cp310-abi3-" in wheel.filename
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert held - FILES == {"megalite/kernels/native_library.so"}
    wheel.extractall(tmp_path / "installed")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    environment.pop("MEGALITE_KERNELS", None)
    for switch, expected in (
        ({}, "CPU:  native"),
        ({"MEGALITE_KERNELS": "off"}, "native kernels: none"),
    ):
        run = subprocess.run(
            [sys.executable, "-m", "megalite.kernels"],
            cwd=tmp_path,
            env=environment | switch,
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0 and run.stdout.startswith(expected), run.stdout + run.stderr


def test_without_torch_in_the_build_environment_the_wheel_is_pure_python(tmp_path):
    """As under pip's build isolation."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError")
    wheel = build_wheel(tmp_path / "source", tmp_path / "out", PYTHONPATH=str(tmp_path))
    assert wheel.filename.endswith("-py3-none-any.whl")
    assert not any(name.endswith(".so") for name in wheel.namelist())


def test_wheel_holds_the_package_and_nothing_else(wheel):
    assert wheel.filename.endswith("-py3-none-any.whl")
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert held == FILES


def test_wheel_has_version_and_license(wheel):
    from megalite import __version__

    assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())
    metadata = next(name for name in wheel.namelist() if name.endswith("METADATA"))
    assert f"\nVersion: {__version__}\n" in wheel.read(metadata).decode()


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The bin folder of an environment with the wheel, and with what this environment has
    installed."""
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin/python"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "--python",
            python,
            "install",
            "--no-deps",
            "--no-index",
            "-q",
            wheel.filename,
        ],
        check=True,
    )
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def run_installed(installed: Path, folder: Path, *command: str) -> subprocess.CompletedProcess:
    """Run a command of the environment in a folder that has no checkout, without PYTHONPATH."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["PATH"] = f"{installed}{os.pathsep}{environment['PATH']}"
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("program", COMMANDS)
def test_each_installed_program_shows_its_help_in_any_folder(program, installed, tmp_path):
    done = run_installed(installed, tmp_path, "megalite", program, "--help")
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert f"megalite {program}" in done.stdout


def test_installed_programs_work_in_any_folder(installed, tmp_path):
    """From text to a trained model, sampled from; and a job for SLURM whose copy of the code
    runs."""
    (tmp_path / "a.jsonl").write_text('{"text": "We the people of the United States"}\n' * 40)
    commands = [
        "megalite preprocess --input a.jsonl --output-prefix a --tokenizer-type ByteTokenizer "
        "--append-eod",
        "megalite inspect-dataset a_text_document --verify",
        "megalite merge --input a_text_document --output-prefix b",
        "python -m megalite pretrain-gpt --data-path b --tokenizer-type ByteTokenizer "
        "--num-layers 1 --save out "
        "--hidden-size 32 --num-attention-heads 2 --seq-length 16 --train-iters 2 "
        "--eval-interval 0 --eval-iters 0 --device cpu",
        "megalite generate --load out --max-new-tokens 3 --device cpu",
        "megalite submit --run-dir run --nodes 1 --mock-data --vocab-size 512 --train-iters 10 "
        "--dry-run",
    ]
    for command in commands:
        done = run_installed(installed, tmp_path, *command.split())
        assert done.returncode == 0, (command, done.stdout, done.stderr)
    # Without sbatch the job is left ready.
    environment = {"PATH": str(installed), "HOME": str(tmp_path)}
    job = [installed / "megalite", *commands[-1].split()[1:-1]]
    done = subprocess.run(job, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "sbatch cannot be run" in done.stderr, done.stderr
    kept = tmp_path / "run/submitted-1"
    check = ["--config", str(kept / "config.yaml"), "--world-size", "8"]
    done = run_installed(installed, tmp_path, "python", str(kept / "code/pretrain_gpt.py"), *check)
    assert done.returncode == 0 and "Nothing was started" in done.stdout, done.stderr


def test_the_public_names_are_there_and_importing_the_package_loads_no_torch():
    code = (
        "import sys, megalite; assert 'torch' not in sys.modules; "
        "from megalite import *; print(*(name for name in megalite.__all__ if name in globals()))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == megalite.__all__ and len(megalite.__all__) == 10, done.stderr
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = megalite.nothing
    code = re.findall(r"```python\n(.*?)```", (ROOT / "docs/library.md").read_text(), re.DOTALL)
    assert not re.search(r"megalite\.\w+\.|from megalite\.", "".join(code))


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_needs_no_torch(program):
    code = (
        "import atexit, runpy, sys; atexit.register(lambda: print('torch' in sys.modules, "
        "file=sys.stderr)); "
        "sys.argv = [sys.argv[1], '--help']; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, program],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (run.returncode, run.stderr) == (0, "False\n")
    assert "usage" in run.stdout
