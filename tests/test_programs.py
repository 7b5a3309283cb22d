"""The programs: their scripts and the command `megalite`, an old Python, encodings of the output, a
reader that ends."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megalite.programs.main import PROGRAMS, overview, with_commands

ROOT = Path(__file__).resolve().parents[1]
ROOT_SCRIPTS = [ROOT / "pretrain_gpt.py", ROOT / "pretrain_bert.py"]
SCRIPTS = [*ROOT_SCRIPTS, *sorted((ROOT / "tools").glob("*.py"))]
READ_BY_OLD_PYTHONS = [
    *SCRIPTS,
    ROOT / "megalite/__init__.py",
    ROOT / "megalite/__main__.py",
    ROOT / "megalite/programs/__init__.py",
    ROOT / "megalite/programs/start.py",
]
OLD = """
import runpy, sys
sys.version_info = (3, 9, 18, "final", 0)
sys.version = "3.9.18 (main)"
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Runs a script as if by Python 3.9."""


def run(*command, **options) -> subprocess.CompletedProcess:
    options = {"cwd": ROOT, "env": environment()} | options
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)} | more


# The command


def test_each_script_is_a_program_and_each_program_has_a_script():
    assert sorted(PROGRAMS.values()) == sorted(path.stem for path in SCRIPTS)


def test_the_command_lists_every_program_with_one_line():
    listed = [line.split()[0] for line in overview().splitlines() if line.startswith("  ")]
    assert listed == list(PROGRAMS)
    assert max(map(len, overview().splitlines())) <= 120
    for arguments in ([], ["--help"]):
        done = run(sys.executable, "-m", "megalite", *arguments)
        assert (done.returncode, done.stdout, done.stderr) == (0, overview() + "\n", "")


def test_the_command_loads_neither_torch_nor_a_program():
    code = (
        "import atexit, sys; from megalite.programs.start import start; "
        "atexit.register(lambda: print('torch' in sys.modules, 'megalite.config' in sys.modules)); start()"  # noqa: E501
    )
    assert run(sys.executable, "-c", code).stdout.endswith("False False\n")


def test_an_unknown_program_is_an_error_and_the_status_is_the_program_s():
    done = run(sys.executable, "-m", "megalite", "pretrain")
    assert done.returncode == 2 and "no program is called 'pretrain'" in done.stderr
    done = run(sys.executable, "-m", "megalite", "pretrain-gpt", "--bogus")
    assert done.returncode == 2
    assert done.stderr.startswith("megalite pretrain-gpt: 1 problem in the configuration")


def test_help_shows_the_command_that_was_given():
    assert with_commands("python tools/merge_datasets.py, srun python pretrain_gpt.py, a.py") == (
        "megalite merge, srun megalite pretrain-gpt, a.py"
    )
    launched = with_commands("torchrun --nproc-per-node 8 pretrain_bert.py --tp 2")
    assert launched == "torchrun --nproc-per-node 8 -m megalite pretrain-bert --tp 2"


# A Python that is too old


@pytest.mark.parametrize("path", READ_BY_OLD_PYTHONS, ids=lambda path: path.stem)
def test_what_an_old_python_reads_has_no_new_syntax(path):
    tree = ast.parse(path.read_text(), feature_version=(3, 4))
    for node in ast.walk(tree):
        # What Python 2.7 cannot read either: text with values in it, and annotations.
        assert not isinstance(node, ast.JoinedStr | ast.AnnAssign)
        if isinstance(node, ast.FunctionDef):
            assert node.returns is None
            assert all(argument.annotation is None for argument in node.args.args)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_an_old_python_says_which_one_is_needed(path):
    done = run(sys.executable, "-c", OLD, path, "--help")
    assert done.returncode == 1 and not done.stdout
    assert done.stderr == (
        f"{path.name}: megalite needs Python 3.10 or newer, "
        f"this is Python 3.9.18 ({sys.executable})\n"
    )


# Encodings, and readers that end


@pytest.fixture(scope="module")
def prefix(tmp_path_factory) -> Path:
    """A dataset whose name and text are not ASCII, and beside it its texts."""
    folder = tmp_path_factory.mktemp("ünïcode")
    lines = ['{"text": "Fünf Bücher für 5 €"}\n'] * 40
    (folder / "ü.jsonl").write_text("".join(lines), encoding="utf-8")
    done = preprocess(folder, "out", env=environment(PYTHONIOENCODING="ascii"))
    assert done.returncode == 0, done.stderr
    return folder / "out_text_document"


def preprocess(folder: Path, name: str, **options) -> subprocess.CompletedProcess:
    return run(
        sys.executable, ROOT / "tools/preprocess_data.py", "--input", folder / "ü.jsonl",
        "--output-prefix", folder / name, "--tokenizer-type", "ByteTokenizer", **options,
    )  # fmt: skip


def arguments_of(program: str, prefix: Path, out: Path) -> list[str]:
    """Arguments with which a program prints something that is not ASCII: a result, or an error."""
    text = prefix.parent / "ü.jsonl"
    missing = prefix.parent / "missing"
    return {
        "train_tokenizer": ["--kind", "bpe", "--vocab-size", "262", "--input", text,
                            "--output-prefix", out / "ü"],
        "preprocess_data": ["--input", text, "--output-prefix", out / "ü",
                            "--tokenizer-type", "ByteTokenizer"],
        "merge_datasets": ["--input", prefix, "--output-prefix", out / "ü"],
        "inspect_dataset": [prefix, "--tokenizer-type", "ByteTokenizer", "--verify"],
        "inspect_checkpoint": [missing],
        "generate_text": ["--load", missing],
        "fill_mask": ["--load", missing, "--text", "ü [MASK]"],
        "finetune_classifier": ["--load", missing, "--train", text, "--valid-share", "0.1"],
        "classify": ["--classifier", missing, "--input", text, "--output", out / "ü.jsonl"],
        "draw_schedule": ["--measured", missing, "--output", out / "ü.svg"],
        "plot_metrics": [missing, "--output", out / "ü.png"],
        "submit": ["--run-dir", out / "ü", "--nodes", "2", "--mock-data", "--vocab-size", "512",
                   "--train-iters", "10", "--dry-run"],
        "convert_checkpoint": ["--from", "hf", "--to", "megalite", "--load", missing,
                               "--save", out / "ü"],
        "verify_layouts": ["--config", missing],
        "pretrain_gpt": ["--config", missing],
        "pretrain_bert": ["--config", missing],
    }[program]  # fmt: skip


WITH_RESULTS = {"train_tokenizer", "preprocess_data", "merge_datasets", "inspect_dataset", "submit"}


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_an_encoding_without_the_characters_is_no_error(path, encoding, prefix, tmp_path):
    arguments = arguments_of(path.stem, prefix, tmp_path)
    done = subprocess.run(
        list(map(str, [sys.executable, path, *arguments])),
        cwd=ROOT, env=environment(PYTHONIOENCODING=encoding), capture_output=True,
    )  # fmt: skip
    printed = (done.stdout + done.stderr).decode(encoding)
    assert "Traceback" not in printed, printed
    assert (done.returncode == 0) == (path.stem in WITH_RESULTS), printed
    assert ("\\xfc" if encoding == "ascii" else "ü") in printed
    if path.stem == "inspect_dataset":
        assert "F\\xfcnf" in printed or "Fünf" in printed
        assert "\\u20ac" in printed and "verified: all 40 sequences" in printed


@pytest.mark.parametrize("buffered", [True, False])
def test_an_output_that_is_full_is_one_line(buffered, tmp_path):
    flags = {} if buffered else {"PYTHONUNBUFFERED": "1"}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, ROOT / "pretrain_gpt.py", "--help"],
            env=environment() | flags, stdout=full, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("error: the output cannot be written: No space left on device: ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_reader_that_ends_is_no_traceback(path, prefix, tmp_path):
    """The reader of stdout closes its end before anything is written, as `head` may."""
    arguments = arguments_of(path.stem, prefix, tmp_path)
    if path.stem not in WITH_RESULTS:
        arguments = ["--help"]
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            list(map(str, [sys.executable, path, *arguments])),
            cwd=ROOT, env=environment(), stdout=writer, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    finally:
        os.close(writer)
    assert "rror" not in done.stderr and "Exception" not in done.stderr, done.stderr
    assert done.returncode in (0, 1)
