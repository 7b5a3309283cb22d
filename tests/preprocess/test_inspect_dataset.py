"""tools/inspect_dataset.py, run on real files."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megalite.data.indexed import DatasetInfo
from megalite.data.tokenizers import ByteTokenizer
from megalite.preprocess.indexed_writer import IndexedWriter

ROOT = Path(__file__).parents[2]
TEXTS = ["The first document", "", "a [bold] one: né"]


@pytest.fixture
def prefix(tmp_path) -> Path:
    """Three documents of bytes, the last of two sequences."""
    with IndexedWriter(tmp_path / "data", "u2") as writer:
        for text in TEXTS:
            ids = np.frombuffer(text.encode(), np.uint8)
            writer.add_document(ids[:9], ids[9:]) if text == TEXTS[-1] else writer.add_document(ids)
        writer.finish(
            DatasetInfo(
                "ByteTokenizer", 257, 256, ByteTokenizer.sha256, writer.documents, writer.tokens
            )
        )
    return tmp_path / "data"


def inspect(*arguments, status=0) -> str:
    """Runs the tool and checks its exit status: what it printed, to standard error unless that is
    0."""
    command = [sys.executable, str(ROOT / "tools/inspect_dataset.py"), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == status, done.stdout + done.stderr
    return re.sub(r"[\s│]+", " ", done.stdout if status == 0 else done.stderr)


def test_it_shows_sizes_and_documents(prefix):
    shown = inspect(
        prefix, "--documents", 9, "--tokens", 12, "--tokenizer-type", "ByteTokenizer", "--verify"
    )
    for text in (
        "documents 3 ",
        "sequences 4 ",
        "tokens 35 ",
        "uint16, 70 bytes",
        "contiguous yes",
        "257 ids",
        "document 0, 18 tokens: The first do ...",
        "document 1, 0 tokens:",
        "document 2, 17 tokens: a [bold] one ...",
        "verified: all 4 sequences and 3 documents",
    ):
        assert text in shown, text


def test_random_documents_are_some_of_them(prefix):
    shown = {
        tuple(re.findall(r"document (\d), ", inspect(prefix, "--documents", 2, "--random")))
        for _ in range(2)
    }
    assert shown <= {("0", "1"), ("0", "2"), ("1", "2")}


def test_what_is_wrong_with_the_data_is_status_1(prefix):
    description = prefix.parent / "data.json"
    description.write_text(
        description.read_text().replace('"vocab_size": 257', '"vocab_size": 100')
    )
    found = inspect(prefix, "--verify", status=1)
    assert "error:" in found and "vocabulary of 100 entries" in found
    inspect(f"{prefix}.idx")  # only --verify reads the ids; a file's name will do
    prefix.with_suffix(".bin").write_bytes(prefix.with_suffix(".bin").read_bytes()[:-2])
    assert "but the file has 68" in inspect(prefix, status=1)


def test_ids_of_another_tokenizer_are_status_1(tmp_path, prefix):
    other = inspect(prefix, "--tokenizer-type", "NullTokenizer", "--vocab-size", 257, status=1)
    assert (
        "data was made with another tokenizer, a ByteTokenizer of 257 ids. Give that one" in other
    )
    with IndexedWriter(tmp_path / "other", "u2") as writer:
        writer.add_document(np.array([5, 300]))
        writer.finish()
    found = inspect(tmp_path / "other", "--tokenizer-type", "ByteTokenizer", status=1)
    assert "document 0: id 300, but the tokenizer has 257 ids" in found


def test_what_is_wrong_with_the_arguments_is_status_2(prefix):
    assert "--documents -1 must be a" in inspect(prefix, "--documents", -1, status=2)
    assert "--tokenizer-model" in inspect(
        prefix, "--tokenizer-type", "SentencePieceTokenizer", status=2
    )


def test_the_description_is_checked_and_shown(tmp_path, prefix):
    assert "documents end with it not recorded" in inspect(f"{prefix}.json")
    description = tmp_path / "data.json"
    sound = description.read_text()
    for key, value in (
        ("vocab_size", '"257"'),
        ("eod", '"256"'),
        ("tokens", "null"),
        ("append_eod", '"yes"'),
    ):
        changed = {**json.loads(sound), key: json.loads(value)}
        description.write_text(json.dumps(changed))
        found = inspect(prefix, status=1)
        assert (
            "data.json: not a dataset description" in found
            and f"$.{key}" in found
            and "Traceback" not in found
        )


def test_a_prefix_is_shown_as_it_is(tmp_path, prefix):
    (tmp_path / "d[red]x").mkdir()
    for suffix in (".bin", ".idx", ".json"):
        prefix.with_suffix(suffix).rename(tmp_path / "d[red]x" / f"y{suffix}")
    assert "d[red]x/y" in inspect(tmp_path / "d[red]x" / "y").replace(" ", "")


def test_negative_ids_are_wrong_without_a_description(tmp_path):
    for name, ids in (("sound", [1, 2, 5, 4]), ("negative", [1, 2, -5, 4])):
        with IndexedWriter(tmp_path / name, "i4") as writer:
            writer.add_document(np.array(ids))
            writer.finish()
        assert not (tmp_path / f"{name}.json").exists()
    shown = inspect(tmp_path / "sound", "--verify")
    assert "all 1 sequences and 1 documents are sound; the largest id is 5" in shown
    found = inspect(tmp_path / "negative", "--verify", status=1)
    assert "negative.bin: id -5 at token 2, but ids are at least 0 (1 such ids" in found
