"""Merging: only what belongs together, and complete or not at all; also the merge of partitions."""

import gzip
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megalite.data.indexed import DatasetError, DatasetInfo
from megalite.data.tokenizers import train_sentencepiece
from megalite.preprocess.merge import find_prefixes, merge
from megalite.preprocess.run import preprocess
from tests.preprocess.preprocess_runs import (
    DOCUMENTS,
    ENVIRONMENT,
    ROOT,
    config,
    content,
    flags,
    limit_file_size,
    run_tool,
    write_jsonl,
)

KILLED = """
import importlib, os, signal, sys
from megalite.preprocess import indexed_writer, journal
call, number = sys.argv[1], int(sys.argv[2])
holders = {"copying": (indexed_writer.IndexedWriter, "append"), "renaming": (os, "rename")}
holder, name = holders[call]
real, calls = getattr(holder, name), 0
def counted(*arguments):
    global calls
    calls += 1
    if calls == number:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments)
if __name__ == "__main__":
    setattr(holder, name, counted)
    tool = importlib.import_module("megalite.programs." + sys.argv[3])
    sys.argv = sys.argv[3:]
    sys.exit(tool.main())
"""
"""A tool that is killed at a call that copies a dataset, or gives a file its final name."""


STOPPED = "os.kill(os.getpid(), signal.SIGKILL)"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("KeyboardInterrupt", "interrupted"),
        ("PermissionError(13, 'Permission denied', 'x')", "or give a path that you may use"),
    ],
)
def test_a_stopped_merge_is_one_line_and_leaves_nothing(tmp_path, error, said):
    shards = make_shards(tmp_path)
    before = set(os.listdir(tmp_path))
    arguments = ["--input", *shards, "--output-prefix", tmp_path / "m"]
    code = KILLED.replace(STOPPED, f"raise {error}")
    done = run_stopped(code, "copying", 2, "merge_datasets", *arguments)
    assert done.returncode == 1
    assert re.fullmatch(f"error: .*{said}\n", done.stderr), done.stderr
    assert set(os.listdir(tmp_path)) == before


def run_stopped(code, *arguments):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    settings = {"cwd": ROOT, "env": ENVIRONMENT, "timeout": 60}
    return subprocess.run(command, capture_output=True, text=True, **settings)


def run_killed(*arguments):
    done = run_stopped(KILLED, *arguments)
    assert done.returncode == -signal.SIGKILL, done.stderr


def make_shards(tmp_path, count=3, source=None, **settings) -> list[str]:
    """Shards of the documents, and the whole as `whole`. Returns the shards' prefixes."""
    source = source or write_jsonl(tmp_path / "a.jsonl")
    for number in range(count):
        preprocess(config(tmp_path, source, name="part", shard=f"{number}/{count}", **settings))
    return [
        str(tmp_path / f"part_{number:04d}-of-{count:04d}_text_document") for number in range(count)
    ]


@pytest.mark.parametrize(
    ("call", "number"), [("copying", 2), ("renaming", 1), ("renaming", 2), ("renaming", 3)]
)
def test_a_killed_merge_leaves_nothing_when_it_is_run_again(tmp_path, call, number):
    shards = make_shards(tmp_path)
    preprocess(config(tmp_path, str(tmp_path / "a.jsonl"), name="whole"))
    arguments = ["--input", *shards, "--output-prefix", tmp_path / "m_text_document"]
    before = set(os.listdir(tmp_path))
    run_killed(call, number, "merge_datasets", *arguments)
    assert not (tmp_path / "m_text_document.idx").exists()
    done = run_tool("merge_datasets.py", *arguments)
    assert done.returncode == 0, done.stderr
    assert set(os.listdir(tmp_path)) - before == {
        f"m_text_document{suffix}" for suffix in (".bin", ".idx", ".json")
    }
    assert content(tmp_path, "m") == content(tmp_path, "whole")


@pytest.mark.parametrize(
    ("call", "number"), [("copying", 2), ("renaming", 2), ("renaming", 4), ("renaming", 6)]
)
def test_partitions_killed_during_the_merge_resume(tmp_path, call, number):
    source = write_jsonl(tmp_path / "a.jsonl")
    Path(source).write_text("bad\n" + Path(source).read_text())
    arguments = [*flags(tmp_path, source), "--append-eod", "--partitions", 2, "--workers", 1]
    arguments += ["--max-bad-lines", 1]
    run_killed(call, number, "preprocess_data", *arguments)
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]
    assert not (tmp_path / "out_text_document.idx").exists()
    done = run_tool("preprocess_data.py", *arguments)
    assert done.returncode == 0, done.stderr
    preprocess(config(tmp_path, source, name="whole", max_bad_lines=1))
    assert content(tmp_path, "out") == content(tmp_path, "whole")
    assert sorted(name for name in os.listdir(tmp_path) if "out" in name) == [
        "out.bad_lines.tsv",
        "out_text_document.bin",
        "out_text_document.idx",
        "out_text_document.json",
    ]
    assert (tmp_path / "out.bad_lines.tsv").read_bytes() == (
        tmp_path / "whole.bad_lines.tsv"
    ).read_bytes()
    assert "1 bad lines were left out: see" in done.stdout and "\n0.00 s" not in done.stdout


def test_a_full_disk_is_one_line_that_names_the_file(tmp_path):
    shards = make_shards(tmp_path, source=write_jsonl(tmp_path / "a.jsonl", DOCUMENTS * 20))
    before = set(os.listdir(tmp_path))
    arguments = ["--input", *shards, "--output-prefix", tmp_path / "m"]
    done = run_tool("merge_datasets.py", *arguments, preexec_fn=limit_file_size)
    assert done.returncode == 1
    path = tmp_path / "m.partial" / "m.bin"
    assert done.stderr.startswith(f"error: {path}: File too large: a file may be no larger than ")
    assert "which ulimit -f sets" in done.stderr and done.stderr.count("\n") == 1
    assert set(os.listdir(tmp_path)) == before


def test_a_full_disk_leaves_no_files_of_a_writer_without_a_staging_directory(tmp_path):
    code = (
        "import sys, numpy as np; from megalite.preprocess.indexed_writer import IndexedWriter\n"
        "with IndexedWriter(sys.argv[1], 'u2') as writer:\n"
        "    for _ in range(100): writer.add_document(np.zeros(900, 'u2'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "m")],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=limit_file_size,
    )
    assert done.returncode == 1 and "File too large: " in done.stderr and "/m.bin'" in done.stderr
    assert os.listdir(tmp_path) == []


def test_shards_of_inputs_that_changed_between_them_are_refused(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl")
    shards = make_shards(tmp_path)
    assert len({DatasetInfo.read(shard).inputs for shard in shards}) == 1
    write_jsonl(tmp_path / "a.jsonl", DOCUMENTS + DOCUMENTS[:1])
    for suffix in (".bin", ".idx", ".json"):
        Path(shards[1] + suffix).unlink()
    preprocess(config(tmp_path, source, name="part", shard="1/3"))
    with pytest.raises(
        DatasetError,
        match="0001-of-0003_text_document was made from other inputs than .*0000-of-0003",
    ):
        merge(shards, tmp_path / "m")
    assert not list(tmp_path.glob("m*"))


def test_shards_must_be_in_order_and_given_once(tmp_path):
    shards = make_shards(tmp_path)
    assert find_prefixes(shards) == (shards, [])
    (problem,) = find_prefixes([shards[2], shards[0], shards[1]])[1]
    assert "part_text_document are in the order 2, 0, 1; give them by number" in problem
    other = f"{tmp_path}/./{Path(shards[1]).name}"
    assert f"--input {other}: given twice" in find_prefixes([*shards, other])[1]
    merge(shards, tmp_path / "part_text_document")
    (problem,) = find_prefixes([str(tmp_path)])[1]
    assert "part_text_document is given beside its shards" in problem


def change(prefix: str, **changes) -> None:
    """Write a description with other values."""
    info = replace(DatasetInfo.read(prefix), **changes)
    Path(f"{prefix}.json").write_text(json.dumps(vars(info)))


def test_datasets_made_with_other_options_are_refused(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl")
    preprocess(config(tmp_path, source, name="with"))
    preprocess(config(tmp_path, source, name="without", append_eod=False))
    one = str(tmp_path / "with_text_document")
    other = str(tmp_path / "without_text_document")
    with pytest.raises(
        DatasetError, match="without_text_document was made without --append-eod, .*/with_.* with$"
    ):
        merge([one, other], tmp_path / "m")
    change(other, append_eod=None)  # an older file does not record it
    assert merge([one, other], tmp_path / "unrecorded").append_eod is None
    change(other, append_eod=True)
    assert merge([one, other], tmp_path / "recorded").append_eod is True
    Path(f"{other}.json").unlink()
    for prefixes in ([one, other], [other, one]):
        with pytest.raises(DatasetError, match="without_text_document has no .json that tells its"):
            merge(prefixes, tmp_path / "m")
    assert not list(tmp_path.glob("m*"))


@pytest.mark.parametrize("shards", [1, 3, 7])
def test_shards_and_partitions_make_the_whole(tmp_path, shards):
    first = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS[:150])
    second = write_jsonl(tmp_path / "b.jsonl", DOCUMENTS[150:])
    gzip.open(tmp_path / "c.jsonl.gz", "wb").write(Path(first).read_bytes())
    files = (first, second, str(tmp_path / "c.jsonl.gz"))
    preprocess(config(tmp_path, *files, name="whole"))
    for number in range(shards):
        preprocess(config(tmp_path, *files, name="part", shard=f"{number}/{shards}"))
    pattern = str(tmp_path / f"part_*-of-{shards:04d}_text_document.idx")
    merged = ["--output-prefix", tmp_path / "merged_text_document"]
    done = run_tool("merge_datasets.py", "--input", pattern, *merged)
    assert done.returncode == 0, done.stderr
    assert content(tmp_path, "merged") == content(tmp_path, "whole")
    if shards == 3:
        preprocess(config(tmp_path, *files, name="parts", partitions=3))
        assert (
            content(tmp_path, "parts") == content(tmp_path, "whole")
            and not (tmp_path / "parts.partial").exists()
        )
        (tmp_path / "part_0001-of-0003_text_document.idx").unlink()
        done = run_tool(
            "merge_datasets.py", "--input", pattern, "--output-prefix", tmp_path / "again"
        )
        assert (
            done.returncode == 2
            and "of 3 shards" in done.stderr
            and " 1 are missing" in done.stderr
        )


def test_shards_name_the_lines_of_the_file(tmp_path):
    """A shard begins in the middle of a file, but its bad lines are counted from the file's
    beginning."""
    source = write_jsonl(tmp_path / "a.jsonl")
    lines = Path(source).read_text().splitlines()
    for number in (10, 200, 350):
        lines[number - 1] = "bad"
    Path(source).write_text("\n".join(lines))
    preprocess(config(tmp_path, source, name="whole", max_bad_lines=3))
    preprocess(config(tmp_path, source, name="parts", partitions=3, max_bad_lines=3))
    listed = (tmp_path / "whole.bad_lines.tsv").read_text()
    assert [row.split("\t")[1] for row in listed.splitlines()] == ["10", "200", "350"]
    assert (tmp_path / "parts.bad_lines.tsv").read_text() == listed


def test_datasets_of_other_tokenizers_are_refused(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl")
    (tmp_path / "t.model").write_bytes(train_sentencepiece((d["text"] for d in DOCUMENTS), 300))
    spm = dict(tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(tmp_path / "t.model"))
    preprocess(config(tmp_path, source, name="bytes"))
    preprocess(config(tmp_path, source, name="pieces", **spm))
    names = [tmp_path / f"{name}_text_document" for name in ("bytes", "pieces", "none")]
    done = run_tool("merge_datasets.py", "--input", *names, "--output-prefix", tmp_path / "merged")
    assert done.returncode == 1
    assert (
        "pieces_text_document was made with another tokenizer" in done.stderr
        and "none_text_document.idx: no such" in done.stderr
    )
