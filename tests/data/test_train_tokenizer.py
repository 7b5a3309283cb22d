"""tools/train_tokenizer.py: every kind by hand, as a user runs it, and what it refuses."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from megalite.data.tokenizers import build_tokenizer
from tests.data.tokenizer_files import SENTENCES

TOOL = Path(__file__).resolve().parents[2] / "tools" / "train_tokenizer.py"
KINDS = {
    "sentencepiece-bpe": ("SentencePieceTokenizer", {"tokenizer_model": ".model"}, []),
    "sentencepiece-unigram": ("SentencePieceTokenizer", {"tokenizer_model": ".model"}, []),
    "bpe": ("GPT2BPETokenizer", {"vocab_file": "-vocab.json", "merge_file": "-merges.txt"}, []),
    "wordpiece": ("BertWordPieceCase", {"vocab_file": "-vocab.txt"}, []),
    "wordpiece, lower case": (
        "BertWordPieceLowerCase",
        {"vocab_file": "-vocab.txt"},
        ["--lowercase"],
    ),
}


def run(*arguments) -> subprocess.CompletedProcess:
    """The tool with these arguments."""
    return subprocess.run(
        [sys.executable, TOOL, *map(str, arguments)], capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_a_tokenizer(kind, tmp_path):
    for library in ("sentencepiece", "tokenizers"):
        pytest.importorskip(library)
    name, outputs, more = KINDS[kind]
    size = 130 if name.startswith("Bert") else 310
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"body": text}) + "\n" for text in SENTENCES)
    )
    arguments = ["--input", tmp_path / "a.jsonl", "--json-key", "body", "--vocab-size", size, *more]
    arguments += ["--kind", kind.split(",")[0], "--output-prefix", tmp_path / "t"]
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(tmp_path)) == sorted(
        ["a.jsonl", *("t" + suffix for suffix in outputs.values())]
    )
    files = {field: str(tmp_path / ("t" + suffix)) for field, suffix in outputs.items()}
    tokenizer = build_tokenizer(name, **files)
    assert tokenizer.vocab_size == size
    ids = tokenizer.encode_batch(SENTENCES[:3])
    assert ids.lengths.sum() < sum(
        map(len, SENTENCES[:3])
    )  # pieces of several letters were learned
    again = run(*arguments)
    assert again.returncode == 2 and all(
        f"{path} exists" in again.stderr for path in files.values()
    )


def test_what_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    prefix = ["--input", tmp_path / "a.txt", "--output-prefix", tmp_path / "t"]
    done = run(*prefix, "--vocab-size", 257, "--kind", "bpe", "--lowercase")
    assert done.returncode == 2
    assert "must be above 257" in done.stderr and "--lowercase: --kind bpe" in done.stderr
    done = run(*prefix, "--vocab-size", 5000, "--kind", "wordpiece")
    assert done.returncode == 1 and "--vocab-size 5000 does not fit this text" in done.stderr
    assert os.listdir(tmp_path) == ["a.txt"]


def test_what_cannot_be_read_twice_or_written_is_one_line(tmp_path):
    pytest.importorskip("tokenizers")
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in SENTENCES)
    )
    done = run(
        "--input",
        "-",
        "--kind",
        "wordpiece",
        "--vocab-size",
        130,
        "--output-prefix",
        tmp_path / "t",
    )
    assert (
        done.returncode == 2
        and "error: --input -: --kind wordpiece reads the text twice" in done.stderr
    )
    command = [
        sys.executable,
        TOOL,
        "--input",
        tmp_path / "a.jsonl",
        "--kind",
        "bpe",
        "--vocab-size",
        "310",
    ]
    done = subprocess.run(
        [*command, "--output-prefix", tmp_path / "t"], capture_output=True, text=True, timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)),
    )  # fmt: skip
    assert (
        done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    ), done.stderr
    assert os.listdir(tmp_path) == ["a.jsonl"]
