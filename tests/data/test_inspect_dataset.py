"""tools/inspect_dataset.py, run on real files."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megalite.data.indexed import DatasetInfo, IndexedWriter
from megalite.data.tokenizers import ByteTokenizer

ROOT = Path(__file__).parents[2]
TEXTS = ["The first document", "", "a [bold] one: né"]


@pytest.fixture
def prefix(tmp_path) -> Path:
    """Three documents of bytes, the last of two sequences."""
    with IndexedWriter(tmp_path / "data", "u2") as writer:
        for text in TEXTS:
            ids = np.frombuffer(text.encode(), np.uint8)
            writer.add_document(ids[:9], ids[9:]) if text == TEXTS[-1] else writer.add_document(ids)
        writer.finish(DatasetInfo("ByteTokenizer", 257, 256, ByteTokenizer.sha256, writer.documents, writer.tokens))
    return tmp_path / "data"


def inspect(*arguments, status=0) -> str:
    """Runs the tool: what it printed, white space made one space, after checking its exit status."""
    command = [sys.executable, str(ROOT / "tools/inspect_dataset.py"), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == status, done.stdout + done.stderr
    return re.sub(r"[\s│]+", " ", done.stdout if status == 0 else done.stderr)


def test_it_shows_counts_lengths_and_documents(prefix):
    shown = inspect(prefix, "--documents", 9, "--ids", 12, "--tokenizer-type", "ByteTokenizer", "--verify")
    for text in (
        "documents 3 ", "sequences 4 ", "tokens 35 ", "ids stored as uint16", "bytes, .bin 70", "one after another yes",
        "least of all 0 ", "median of all 17 ", "most of all 18 ", "vocab size, .json 257", "checked: every entry",
        f"document 2, {len(TEXTS[2].encode())} tokens", "97 32 91", "... 5 more", "'a [bold] one'", "'The first do'",
    ):  # fmt: skip
        assert text in shown, text


def test_random_documents_are_some_of_them(prefix):
    shown = inspect(prefix, "--documents", 2, "--random")
    assert len(set(re.findall(r"document (\d), ", shown))) == 2


def test_what_is_wrong_with_the_data_is_status_1(prefix):
    assert "no such file" in inspect(f"{prefix}x", status=1)
    (prefix.parent / "data.json").write_text(
        (prefix.parent / "data.json").read_text().replace('"vocab_size": 257', '"vocab_size": 100')
    )
    found = inspect(prefix, "--verify", status=1)
    assert "error:" in found and "vocabulary of 100 entries" in found
    inspect(prefix)  # only --verify reads the ids
    prefix.with_suffix(".bin").write_bytes(prefix.with_suffix(".bin").read_bytes()[:-2])
    assert "but the file has 68" in inspect(prefix, status=1)


def test_ids_of_another_tokenizer_are_status_1(tmp_path):
    with IndexedWriter(tmp_path / "other", "u2") as writer:
        writer.add_document(np.array([5, 300]))
        writer.finish()
    found = inspect(tmp_path / "other", "--documents", 1, "--tokenizer-type", "ByteTokenizer", status=1)
    assert "id 300: the tokenizer has 257 entries" in found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--random",), "give --documents N"),
        (("--documents", -1), "--documents -1: needs at least 0"),
        (("--ids", 0), "--ids 0: needs at least 1"),
        (("--tokenizer-model", "x"), "without --tokenizer-type"),
        (("--tokenizer-type", "SentencePieceTokenizer", "--random"), "--random .*--tokenizer-model"),
        (("--tokenizer-type", "NullTokenizer"), "leave it out"),
    ],
)
def test_what_is_wrong_with_the_arguments_is_status_2(prefix, arguments, message):
    assert re.search(message, inspect(prefix, *arguments, status=2))
