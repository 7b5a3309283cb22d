"""Preprocessing: the same bytes from any number of workers, whole files or none, and errors that
name file and line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megalite.data.indexed import DatasetError, DatasetInfo, IndexedDataset
from megalite.data.tokenizers import ByteTokenizer, train_sentencepiece
from megalite.preprocess import inputs as module
from megalite.preprocess import shard
from megalite.preprocess.config import find_problems
from megalite.preprocess.run import preprocess
from megalite.preprocess.shard import BadLineError
from tests.preprocess.preprocess_runs import (
    DOCUMENTS,
    ENVIRONMENT,
    blocks_of,
    config,
    flags,
    run_tool,
    write_jsonl,
)


@pytest.mark.parametrize("append_eod", [True, False])
def test_documents_come_back(tmp_path, monkeypatch, append_eod):
    monkeypatch.setattr(module, "BLOCK_BYTES", 1000)
    first = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS[:150])
    second = write_jsonl(tmp_path / "b.jsonl", DOCUMENTS[150:])
    reports = []
    settings = config(tmp_path, first, second, json_keys=("title", "text"), append_eod=append_eod)
    infos = preprocess(settings, reports.append)
    for key, info in zip(("title", "text"), infos, strict=True):
        data = IndexedDataset(tmp_path / f"out_{key}_document")
        assert data.dtype == np.uint16 and data.num_documents == len(DOCUMENTS)
        decoded = [data.sequence(i).tolist() for i in range(len(data))]
        end = [ByteTokenizer.eod] if append_eod else []
        assert decoded == [[*document[key].encode(), *end] for document in DOCUMENTS]
        made_by = "ByteTokenizer", 257, 256, ByteTokenizer.sha256
        assert info == DatasetInfo(*made_by, len(DOCUMENTS), data.num_tokens, False, append_eod)
        assert DatasetInfo.read(tmp_path / f"out_{key}_document") == info
    assert len(reports) > 10 and reports[-1].bytes_done == reports[-1].bytes_total
    assert f"{len(DOCUMENTS)} documents" in str(reports[-1]) and "MB/s" in str(reports[-1])


def test_any_number_of_workers_writes_the_same_bytes(tmp_path):
    """Blocks have their usual size: 5 MB make 5 of them."""
    source = write_jsonl(
        tmp_path / "a.jsonl", [{"text": f"{i} " * (1 + i % 1000)} for i in range(3500)]
    )
    assert len(list(blocks_of(source))) >= 5
    for workers in (1, 3):
        preprocess(config(tmp_path, source, name=f"w{workers}", workers=workers))
    for suffix in (".bin", ".idx", ".json"):
        one, three = (tmp_path / f"w{workers}_text_document{suffix}" for workers in (1, 3))
        assert one.read_bytes() == three.read_bytes()


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(300, np.uint16), (65499, np.uint16), (65500, np.int32)]
)
def test_ids_are_stored_in_two_bytes_where_they_fit(tmp_path, monkeypatch, vocab_size, dtype):
    monkeypatch.setattr(ByteTokenizer, "vocab_size", vocab_size)
    preprocess(config(tmp_path, write_jsonl(tmp_path / "a.jsonl")))
    assert IndexedDataset(tmp_path / "out_text_document").dtype == dtype


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "a"', "invalid JSON: Expecting ',' delimiter at column 13"),
        (b"", "the line is empty"),
        (b"  ", "the line is empty"),
        (b'{"text": ""}', "the text is empty"),
        (b'{"text": "\xff"}', "not UTF-8: byte 0xff at column 11"),
        (b'{"txt": "a", "id": 3}', "no key 'text'; keys here: txt, id"),
        (b"{}", "no key 'text'; keys here: none"),
        (b'{"text": 3}', "'text' is int, not text"),
        (b'["text"]', "a JSON object is needed, not list"),
        (b'{"text": "\\ud800"}', "half of a surrogate pair"),
        (b"[" * 100_000, "cannot be read"),
        (
            b'[{"text": "a"},',
            "invalid JSON: Expecting value at column 16; each line must hold one JSON object",
        ),
        (b"{", "double quotes at column 2; each line must hold one JSON object"),
        (b"9" * 10_000, "cannot be read"),
        (b'{"text": null}', "'text' is NoneType, not text"),
    ],
)
def test_a_bad_line_stops_with_file_line_and_reason(tmp_path, line, reason):
    good = b'{"text": "fine"}\n'
    (tmp_path / "a.jsonl").write_bytes(good * 3)
    (tmp_path / "b.jsonl").write_bytes(good * 4 + line + b"\n" + good)
    with pytest.raises(BadLineError) as caught:
        preprocess(config(tmp_path, str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")))
    assert f"{tmp_path / 'b.jsonl'}, line 5: " in str(caught.value) and reason in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "b.jsonl"]


def test_the_first_bad_line_is_reported_whichever_worker_is_faster(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_BYTES", 10)
    monkeypatch.setattr(shard, "COMMIT_SECONDS", float("inf"))  # then nothing is kept
    long = json.dumps({"text": "x" * 1_000_000}).encode() + b"\n"
    (tmp_path / "a.jsonl").write_bytes(long + long[:-2] + b"\n" + b"quick to fail\n" * 5)
    with pytest.raises(
        BadLineError, match=r"a\.jsonl, line 2: invalid JSON: Expecting ',' delimiter"
    ):
        preprocess(config(tmp_path, str(tmp_path / "a.jsonl"), workers=3))
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_empty_input_is_an_error(tmp_path):
    with pytest.raises(DatasetError, match=r"a\.jsonl: no documents"):
        preprocess(config(tmp_path, write_jsonl(tmp_path / "a.jsonl", [])))
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_all_problems_are_reported_at_once_with_status_2(tmp_path):
    (tmp_path / "old_text_document.idx").touch()
    (tmp_path / "empty").mkdir()
    result = run_tool(
        "preprocess_data.py",
        "--input",
        tmp_path / "none.jsonl",
        tmp_path / "empty",
        "--output-prefix",
        tmp_path / "old",
        "--tokenizer-type",
        "SentencePieceTokenizer",
        "--workers",
        0,
        "--json-keys",
        "text",
        "text",
    )
    assert result.returncode == 2
    errors = result.stderr.splitlines()
    assert all(error.startswith("error: ") for error in errors)
    for part in (
        "none.jsonl: no such file",
        "a folder without",
        "old_text_document.idx exists",
        "needs --tokenizer-model",
        "--workers 0: needs at least 1",
        "--json-keys text text",
    ):
        assert sum(part in error for error in errors) == 1, (part, errors)
    assert sorted(os.listdir(tmp_path)) == ["empty", "old_text_document.idx"]
    problems = find_problems(config(tmp_path / "nowhere", write_jsonl(tmp_path / "a.jsonl")))
    assert problems == [
        f"--output-prefix {tmp_path / 'nowhere' / 'out'}: make the folder first: mkdir -p "
        f"{tmp_path / 'nowhere'}"
    ]


def test_the_tools_from_text_to_dataset(tmp_path):
    """JSONL to tokenizer to dataset, as a user does it; no torch on the way."""
    source = write_jsonl(tmp_path / "a.jsonl")
    for name in ("t", "u"):
        arguments = ["--input", source, "--vocab-size", 300, "--output-prefix", tmp_path / name]
        result = run_tool("train_tokenizer.py", *arguments)
        assert result.returncode == 0, result.stderr
    assert (tmp_path / "t.model").read_bytes() == (tmp_path / "u.model").read_bytes()
    assert (tmp_path / "t.model").read_bytes() == train_sentencepiece(
        (d["text"] for d in DOCUMENTS), 300
    )
    result = run_tool(
        "preprocess_data.py",
        "--input",
        source,
        "--output-prefix",
        tmp_path / "c",
        "--workers",
        2,
        "--append-eod",
        "--tokenizer-type",
        "SentencePieceTokenizer",
        "--tokenizer-model",
        tmp_path / "t.model",
    )
    assert result.returncode == 0, result.stderr
    assert "400 documents" in result.stdout and result.stderr.count(" MB/s, ") == 1
    data = IndexedDataset(tmp_path / "c_text_document")
    assert data.num_documents == 400 and all(data.sequence(i)[-1] == 2 for i in range(400))
    assert DatasetInfo.read(tmp_path / "c_text_document").vocab_size == 300

    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\nx\n')
    arguments = flags(tmp_path, tmp_path / "bad.jsonl", name="d")
    result = run_tool("preprocess_data.py", *arguments)
    assert result.returncode == 1 and "bad.jsonl, line 2: invalid JSON" in result.stderr
    assert "Traceback" not in result.stderr
    code = (
        "import sys, megalite.preprocess.run, megalite.data.build; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, timeout=60).returncode == 0


def test_train_tokenizer_reports_problems(tmp_path):
    (tmp_path / "t.model").touch()
    (tmp_path / "a.txt").write_bytes(b"fine\n\xff\n")
    result = run_tool(
        "train_tokenizer.py",
        "--input",
        tmp_path / "no",
        "--vocab-size",
        3,
        "--output-prefix",
        tmp_path / "t",
    )
    assert result.returncode == 2
    for part in ("no: no such file", "--vocab-size 3: must be above 260", "t.model exists"):
        assert part in result.stderr
    result = run_tool(
        "train_tokenizer.py",
        "--input",
        tmp_path / "a.txt",
        "--vocab-size",
        300,
        "--output-prefix",
        tmp_path / "u",
    )
    assert result.returncode == 1 and "a.txt, line 1: not UTF-8" in result.stderr
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "t.model"]


def test_a_text_that_the_tokenizer_has_no_ids_for_is_a_bad_line(tmp_path):
    documents = [{"text": text} for text in ("1 2", "3 x", "4", "5 9", "6")]
    source = write_jsonl(tmp_path / "a.jsonl", documents)
    Path(source).write_text("bad\n" + Path(source).read_text())
    null = {"tokenizer_type": "NullTokenizer", "vocab_size": 9}
    with pytest.raises(BadLineError, match="a.jsonl, line 3: 'x' in '3 x' is no id from 0 to 8"):
        preprocess(config(tmp_path, source, max_bad_lines=1, **null))
    preprocess(config(tmp_path, source, max_bad_lines=3, **null))
    data = IndexedDataset(tmp_path / "out_text_document")
    assert [data.sequence(i).tolist() for i in range(len(data))] == [[1, 2, 8], [4, 8], [6, 8]]
    rows = [line.split("\t") for line in (tmp_path / "out.bad_lines.tsv").read_text().splitlines()]
    assert [row[1] for row in rows] == ["1", "3", "5"] and "'9' in '5 9' is no id" in rows[2][2]


def test_bad_lines_are_left_out_up_to_a_number(tmp_path, capsys):
    lines = [
        b'{"text": "a"}',
        b"",
        b'{"text": ""}',
        b"{}",
        b'{"text": "b"}',
        b"\xff",
        b'{"text": "c"}',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    preprocess(config(tmp_path, str(tmp_path / "a.jsonl"), max_bad_lines=4))
    data = IndexedDataset(tmp_path / "out_text_document")
    assert [data.sequence(i).tolist() for i in range(3)] == [
        [97, 256],
        [98, 256],
        [99, 256],
    ] and len(data) == 3
    rows = [line.split("\t") for line in (tmp_path / "out.bad_lines.tsv").read_text().splitlines()]
    assert [row[1] for row in rows] == ["2", "3", "4", "6"] and "no key 'text'" in rows[2][2]
    assert capsys.readouterr().err.count("left out: ") == 4
    with pytest.raises(
        BadLineError, match="line 6: not UTF-8.* This is bad line 4. --max-bad-lines N .*now 3"
    ):
        preprocess(config(tmp_path, str(tmp_path / "a.jsonl"), name="fewer", max_bad_lines=3))


def test_sentences_are_sequences_of_documents(tmp_path):
    pytest.importorskip("sentencex")
    texts = ["Mr. Smith went home. He slept.", "One sentence", "He came.  She left!\n\nWho knows?"]
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    preprocess(config(tmp_path, source, split_sentences=True))
    data = IndexedDataset(tmp_path / "out_text_sentence")
    found = [bytes(i for i in data.sequence(n) if i < 256).decode() for n in range(len(data))]
    assert found == [
        "Mr. Smith went home.",
        "He slept.",
        "One sentence",
        "He came.",
        "She left!",
        "Who knows?",
    ]
    assert data.document_indices.tolist() == [0, 2, 3, 6]
    assert [n for n in range(len(data)) if data.sequence(n)[-1] == 256] == [1, 2, 5]


def test_a_look_into_a_dataset(tmp_path):
    preprocess(config(tmp_path, write_jsonl(tmp_path / "a.jsonl")))
    prefix = tmp_path / "out_text_document"
    done = run_tool(
        "inspect_dataset.py",
        prefix,
        "--verify",
        "--documents",
        2,
        "--tokenizer-type",
        "ByteTokenizer",
    )
    assert done.returncode == 0, done.stderr
    assert "ByteTokenizer, 257 ids, end of document 256" in done.stdout and "400" in done.stdout
    assert "document 1, 33 tokens: Document 1: né" in done.stdout
    assert "verified: all 400 sequences and 400 documents" in done.stdout
    assert "68 111 99" in run_tool("inspect_dataset.py", prefix).stdout
    index = bytearray((tmp_path / "out_text_document.idx").read_bytes())
    index[34 + 4 * 17] += 1  # one length among many
    (tmp_path / "out_text_document.idx").write_bytes(index)
    done = run_tool("inspect_dataset.py", prefix, "--verify")
    assert done.returncode == 1 and "error: " in done.stderr
    assert run_tool("inspect_dataset.py", prefix, "--tokenizer-model", "x").returncode == 2


def test_flags_that_do_not_fit_are_reported_at_once(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl")
    settings = config(
        tmp_path,
        source,
        "-",
        partitions=2,
        language="de",
        max_bad_lines=-1,
        vocab_file="v.txt",
        vocab_size=9,
    )
    problems = "\n".join(find_problems(settings))
    for part in (
        "cannot be split",
        "--language de has no effect",
        "--max-bad-lines -1",
        "--vocab-file",
        "--vocab-size 9",
    ):
        assert part in problems
    assert any(
        "--shard 3/3" in problem for problem in find_problems(config(tmp_path, source, shard="3/3"))
    )


@pytest.mark.parametrize("append_eod", [True, False])
@pytest.mark.parametrize("sentences", [True, False])
def test_a_text_without_tokens_is_a_bad_line(tmp_path, append_eod, sentences):
    if sentences:
        pytest.importorskip("sentencex")
    source = write_jsonl(
        tmp_path / "a.jsonl", [{"text": text} for text in ("1 2", " ", "4", "\n\t")]
    )
    settings = config(
        tmp_path,
        source,
        tokenizer_type="NullTokenizer",
        vocab_size=9,
        append_eod=append_eod,
        max_bad_lines=2,
        split_sentences=sentences,
    )
    preprocess(settings)
    data = IndexedDataset(settings.prefix("text"))
    end = [8] if append_eod else []
    assert [data.sequence(i).tolist() for i in range(len(data))] == [[1, 2, *end], [4, *end]]
    rows = [
        line.split("\t")[1:] for line in (tmp_path / "out.bad_lines.tsv").read_text().splitlines()
    ]
    reason = "the text gives no tokens (--skip-empty leaves it out)"
    assert rows == [["2", reason], ["4", reason]]


@pytest.mark.parametrize("language", ["english", "EN", ""])
def test_a_language_is_a_code(tmp_path, language):
    pytest.importorskip("sentencex")
    source = write_jsonl(tmp_path / "a.jsonl")
    (problem,) = find_problems(config(tmp_path, source, split_sentences=True, language=language))
    assert "needs an ISO 639 code" in problem
