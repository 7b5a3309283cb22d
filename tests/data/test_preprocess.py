"""Preprocessing: the same bytes from any number of workers, whole files or none, and errors that name file and line."""

import errno
import fcntl
import gzip
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megalite.data import inputs as module
from megalite.data.indexed import DatasetError, DatasetInfo, IndexedDataset
from megalite.data.journal import Journal
from megalite.data.preprocess import BadLineError, preprocess
from megalite.data.preprocess_config import find_problems
from megalite.data.tokenizers import ByteTokenizer, train_sentencepiece
from tests.data.preprocess_runs import DOCUMENTS, ENVIRONMENT, ROOT, blocks_of, config, content, run_tool, write_jsonl


@pytest.mark.parametrize("append_eod", [True, False])
def test_documents_come_back(tmp_path, monkeypatch, append_eod):
    monkeypatch.setattr(module, "BLOCK_BYTES", 1000)
    inputs = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS[:150]), write_jsonl(tmp_path / "b.jsonl", DOCUMENTS[150:])
    reports = []
    settings = config(tmp_path, *inputs, json_keys=("title", "text"), append_eod=append_eod)
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
    """Blocks are as large as they are in earnest: 5 MB make 5 of them."""
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": f"{i} " * (1 + i % 1000)} for i in range(3500)])
    assert len(list(blocks_of(source))) >= 5
    for workers in (1, 3):
        preprocess(config(tmp_path, source, name=f"w{workers}", workers=workers))
    for suffix in (".bin", ".idx", ".json"):
        one, three = (tmp_path / f"w{workers}_text_document{suffix}" for workers in (1, 3))
        assert one.read_bytes() == three.read_bytes()


@pytest.mark.parametrize(("vocab_size", "dtype"), [(300, np.uint16), (65499, np.uint16), (65500, np.int32)])
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
        (b'[{"text": "a"},', "invalid JSON: Expecting value at column 16; each line must hold one JSON object"),
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
    long = json.dumps({"text": "x" * 1_000_000}).encode() + b"\n"
    (tmp_path / "a.jsonl").write_bytes(long + long[:-2] + b"\n" + b"quick to fail\n" * 5)
    with pytest.raises(BadLineError, match=r"a\.jsonl, line 2: invalid JSON: Expecting ',' delimiter"):
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
        "preprocess_data.py", "--input", tmp_path / "none.jsonl", tmp_path / "empty",
        "--output-prefix", tmp_path / "old", "--tokenizer-type", "SentencePieceTokenizer",
        "--workers", 0, "--json-keys", "text", "text",
    )  # fmt: skip
    assert result.returncode == 2
    errors = result.stderr.splitlines()
    assert all(error.startswith("error: ") for error in errors)
    for part in ("none.jsonl: no such file", "a folder without", "old_text_document.idx exists",
                 "needs --tokenizer-model", "--workers 0: needs at least 1", "--json-keys text text"):  # fmt: skip
        assert sum(part in error for error in errors) == 1, (part, errors)
    assert sorted(os.listdir(tmp_path)) == ["empty", "old_text_document.idx"]
    problems = find_problems(config(tmp_path / "nowhere", write_jsonl(tmp_path / "a.jsonl")))
    assert problems == [
        f"--output-prefix {tmp_path / 'nowhere' / 'out'}: make the folder first: mkdir -p {tmp_path / 'nowhere'}"
    ]


def test_the_tools_by_hand(tmp_path):
    """JSONL to tokenizer to dataset, as a user does it; no torch on the way."""
    source = write_jsonl(tmp_path / "a.jsonl")
    for name in ("t", "u"):
        result = run_tool(
            "train_tokenizer.py", "--input", source, "--vocab-size", 300, "--output-prefix", tmp_path / name
        )
        assert result.returncode == 0, result.stderr
    assert (tmp_path / "t.model").read_bytes() == (tmp_path / "u.model").read_bytes()
    assert (tmp_path / "t.model").read_bytes() == train_sentencepiece((d["text"] for d in DOCUMENTS), 300)
    result = run_tool(
        "preprocess_data.py", "--input", source, "--output-prefix", tmp_path / "c", "--workers", 2, "--append-eod",
        "--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", tmp_path / "t.model",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "400 documents" in result.stdout and result.stderr.count(" MB/s, ") == 1
    data = IndexedDataset(tmp_path / "c_text_document")
    assert data.num_documents == 400 and all(data.sequence(i)[-1] == 2 for i in range(400))
    assert DatasetInfo.read(tmp_path / "c_text_document").vocab_size == 300

    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\nx\n')
    result = run_tool("preprocess_data.py", "--input", tmp_path / "bad.jsonl", "--output-prefix", tmp_path / "d",
                      "--tokenizer-type", "ByteTokenizer")  # fmt: skip
    assert result.returncode == 1 and "bad.jsonl, line 2: invalid JSON" in result.stderr
    assert "Traceback" not in result.stderr
    code = "import sys, megalite.data.preprocess, megalite.data.build; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, timeout=60).returncode == 0


def test_train_tokenizer_reports_problems(tmp_path):
    (tmp_path / "t.model").touch()
    (tmp_path / "a.txt").write_bytes(b"fine\n\xff\n")
    result = run_tool(
        "train_tokenizer.py", "--input", tmp_path / "no", "--vocab-size", 3, "--output-prefix", tmp_path / "t"
    )
    assert result.returncode == 2
    for part in ("no: no such file", "--vocab-size 3: must be above 260", "t.model exists"):
        assert part in result.stderr
    result = run_tool(
        "train_tokenizer.py", "--input", tmp_path / "a.txt", "--vocab-size", 300, "--output-prefix", tmp_path / "u"
    )
    assert result.returncode == 1 and "a.txt, line 1: not UTF-8" in result.stderr
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "t.model"]


SLOW_RUN = """
import json, sys, time
from megalite.data import inputs, preprocess
if __name__ == "__main__":
    inputs.BLOCK_BYTES, preprocess.COMMIT_SECONDS = 500, -1.0
    def report(progress):
        print(progress.documents, flush=True)
        time.sleep(0.01)
    preprocess.preprocess(preprocess.PreprocessConfig(**json.loads(sys.argv[1])), report)
"""


def start_slowly(tmp_path, **settings):
    """Preprocessing that commits every block, and takes its time."""
    (tmp_path / "slow.py").write_text(SLOW_RUN)
    settings = {
        "tokenizer_type": "ByteTokenizer",
        "append_eod": True,
        "output_prefix": str(tmp_path / "out"),
        **settings,
    }
    command = [sys.executable, tmp_path / "slow.py", json.dumps(settings)]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(("suffix", "workers", "blocks"), [("", 1, 3), ("", 2, 40), (".gz", 1, 20)])
def test_a_killed_run_goes_on_where_it_was(tmp_path, suffix, workers, blocks):
    first, second = (
        write_jsonl(tmp_path / "a.jsonl", DOCUMENTS[:150]),
        write_jsonl(tmp_path / "b.jsonl", DOCUMENTS[150:]),
    )
    (tmp_path / "b.jsonl").write_text((tmp_path / "b.jsonl").read_text() + "bad\n")
    if suffix:
        for path in (first, second):
            gzip.open(path + suffix, "wb").write(Path(path).read_bytes())
    files = [first + suffix, second + suffix]
    process = start_slowly(tmp_path, input=files, workers=workers, max_bad_lines=2)
    for _ in range(blocks):
        assert process.stdout.readline()
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) >= (workers if workers > 1 else 0)
    process.kill()
    process.communicate()
    assert not list(tmp_path.glob("out_text*")) and (tmp_path / "out.partial" / "journal.json").exists()
    deadline = time.monotonic() + 20
    while any(is_running(int(pid)) for pid in children):
        assert time.monotonic() < deadline, "workers outlive the process that started them"
        time.sleep(0.02)
    other = config(tmp_path, *files, append_eod=False, max_bad_lines=2)
    with pytest.raises(DatasetError, match="which was another job: append eod was true, is false.* delete"):
        preprocess(other)
    reports = []
    settings = config(tmp_path, *files, max_bad_lines=2)
    assert find_problems(settings) == []
    preprocess(settings, lambda progress: reports.append((progress.bytes_now, progress.bytes_done)))
    assert 0 < reports[-1][0] < reports[-1][1]  # the first part was kept
    preprocess(config(tmp_path, *files, name="undisturbed", max_bad_lines=2))
    assert content(tmp_path, "out") == content(tmp_path, "undisturbed")
    assert (
        tmp_path / "out.bad_lines.tsv"
    ).read_text() == f"{files[1]}\t251\tinvalid JSON: Expecting value at column 1\n"
    assert not (tmp_path / "out.partial").exists()


def test_two_at_once_and_changed_input_are_refused(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl")
    process = start_slowly(tmp_path, input=[source])
    assert process.stdout.readline()
    with pytest.raises(DatasetError, match="another process is writing this output"):
        preprocess(config(tmp_path, source))
    process.kill()
    process.communicate()
    write_jsonl(tmp_path / "a.jsonl", DOCUMENTS[:-1])
    with pytest.raises(DatasetError, match="another job: input was"):
        preprocess(config(tmp_path, source))


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
    lines = [b'{"text": "a"}', b"", b'{"text": ""}', b"{}", b'{"text": "b"}', b"\xff", b'{"text": "c"}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    preprocess(config(tmp_path, str(tmp_path / "a.jsonl"), max_bad_lines=4))
    data = IndexedDataset(tmp_path / "out_text_document")
    assert [data.sequence(i).tolist() for i in range(3)] == [[97, 256], [98, 256], [99, 256]] and len(data) == 3
    rows = [line.split("\t") for line in (tmp_path / "out.bad_lines.tsv").read_text().splitlines()]
    assert [row[1] for row in rows] == ["2", "3", "4", "6"] and "no key 'text'" in rows[2][2]
    assert capsys.readouterr().err.count("left out: ") == 4
    with pytest.raises(BadLineError, match="line 6: not UTF-8.* This is bad line 4. --max-bad-lines N .*now 3"):
        preprocess(config(tmp_path, str(tmp_path / "a.jsonl"), name="fewer", max_bad_lines=3))


@pytest.mark.parametrize("shards", [1, 3, 7])
def test_shards_and_partitions_make_the_whole(tmp_path, shards):
    first, second = (
        write_jsonl(tmp_path / "a.jsonl", DOCUMENTS[:150]),
        write_jsonl(tmp_path / "b.jsonl", DOCUMENTS[150:]),
    )
    gzip.open(tmp_path / "c.jsonl.gz", "wb").write(Path(first).read_bytes())
    files = (first, second, str(tmp_path / "c.jsonl.gz"))
    preprocess(config(tmp_path, *files, name="whole"))
    for number in range(shards):
        preprocess(config(tmp_path, *files, name="part", shard=f"{number}/{shards}"))
    pattern = str(tmp_path / f"part_*-of-{shards:04d}_text_document.idx")
    done = run_tool("merge_datasets.py", "--input", pattern, "--output-prefix", tmp_path / "merged_text_document")
    assert done.returncode == 0, done.stderr
    assert content(tmp_path, "merged") == content(tmp_path, "whole")
    if shards == 3:
        preprocess(config(tmp_path, *files, name="parts", partitions=3))
        assert content(tmp_path, "parts") == content(tmp_path, "whole") and not (tmp_path / "parts.partial").exists()
        (tmp_path / "part_0001-of-0003_text_document.idx").unlink()
        done = run_tool("merge_datasets.py", "--input", pattern, "--output-prefix", tmp_path / "again")
        assert done.returncode == 2 and "of 3 shards" in done.stderr and " 1 are missing" in done.stderr


def test_shards_name_the_lines_of_the_file(tmp_path):
    """A part begins in the middle of a file, but its bad lines are counted from the file's beginning."""
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


def test_what_a_failure_leaves_and_says(tmp_path):
    """A folder from which the same command goes on, and a line that says so; no folder where there is nothing in it."""
    source = write_jsonl(tmp_path / "a.jsonl")
    Path(source).write_text(Path(source).read_text() + "bad\n")
    arguments = ["--input", source, "--output-prefix", tmp_path / "out", "--tokenizer-type", "ByteTokenizer"]
    done = run_tool("preprocess_data.py", *arguments)
    assert done.returncode == 1 and "line 401" in done.stderr and "keeps" not in done.stderr
    assert os.listdir(tmp_path) == ["a.jsonl"]
    # Its parts have a bad line each; together they have more than --max-bad-lines.
    Path(source).write_text("bad\n" + Path(source).read_text())
    arguments += ["--partitions", 2, "--workers", 1, "--max-bad-lines"]
    done = run_tool("preprocess_data.py", *arguments, 1)
    assert done.returncode == 1 and "This is bad line 2." in done.stderr
    assert re.search(r"error: .*a\.jsonl, line (1|402): invalid JSON", done.stderr), done.stderr
    done = run_tool("preprocess_data.py", *arguments, 2)
    assert done.returncode == 0, done.stderr
    assert IndexedDataset(tmp_path / "out_text_document").num_documents == 400
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("partitions", [1, 2])
def test_input_without_documents_leaves_nothing(tmp_path, partitions):
    (tmp_path / "a.jsonl").write_text("bad\nbad\n")
    with pytest.raises(DatasetError, match="no documents"):
        preprocess(config(tmp_path, str(tmp_path / "a.jsonl"), partitions=partitions, max_bad_lines=2))
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_merging_what_does_not_belong_together_is_refused(tmp_path):
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


def test_sentences_are_sequences_of_documents(tmp_path):
    pytest.importorskip("sentencex")
    texts = ["Mr. Smith went home. He slept.", "One sentence", "He came.  She left!\n\nWho knows?"]
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    preprocess(config(tmp_path, source, split_sentences=True))
    data = IndexedDataset(tmp_path / "out_text_sentence")
    found = [bytes(i for i in data.sequence(n) if i < 256).decode() for n in range(len(data))]
    assert found == ["Mr. Smith went home.", "He slept.", "One sentence", "He came.", "She left!", "Who knows?"]
    assert data.document_indices.tolist() == [0, 2, 3, 6]
    assert [n for n in range(len(data)) if data.sequence(n)[-1] == 256] == [1, 2, 5]


def test_a_look_into_a_dataset(tmp_path):
    preprocess(config(tmp_path, write_jsonl(tmp_path / "a.jsonl")))
    prefix = tmp_path / "out_text_document"
    done = run_tool("inspect_dataset.py", prefix, "--verify", "--documents", 2, "--tokenizer-type", "ByteTokenizer")
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


def test_flags_that_do_not_fit_are_told_at_once(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl")
    settings = config(
        tmp_path, source, "-", partitions=2, language="de", max_bad_lines=-1, vocab_file="v.txt", vocab_size=9
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
    assert any("--shard 3/3" in problem for problem in find_problems(config(tmp_path, source, shard="3/3")))


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_worker_that_dies_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_BYTES", 1000)

    def kill_workers(_):
        for worker in multiprocessing.active_children():
            worker.kill()

    with pytest.raises(DatasetError, match=r"worker process died \(exit code -9\).*fewer --workers"):
        preprocess(config(tmp_path, write_jsonl(tmp_path / "a.jsonl"), workers=2), kill_workers)
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_a_list_of_bad_lines_is_not_overwritten(tmp_path):
    documents = [{"text": "a", "title": "b"}, {"other": "c"}]
    source = write_jsonl(tmp_path / "a.jsonl", documents)
    preprocess(config(tmp_path, source, max_bad_lines=1))
    settings = config(tmp_path, source, max_bad_lines=1, json_keys=("title",))
    assert any("out.bad_lines.tsv exists; delete it" in problem for problem in find_problems(settings))
    with pytest.raises(DatasetError, match=r"out\.bad_lines\.tsv exists already"):
        preprocess(settings)
    assert not (tmp_path / "out.partial").exists()


def test_the_index_gets_its_name_last(tmp_path, monkeypatch):
    """Who finds it finds everything, also the list of bad lines."""
    named = []
    monkeypatch.setattr(Journal, "end", lambda journal, renames: named.extend(Path(final).name for _, final in renames))
    monkeypatch.setattr(DatasetInfo, "read", lambda prefix: None)
    preprocess(config(tmp_path, write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}, {}]), max_bad_lines=1))
    assert "out.bad_lines.tsv" in named and named[-1] == "out_text_document.idx"


@pytest.mark.parametrize("damaged", ["out_text_document.bin", "bad_lines.tsv", "out_text_document.lengths"])
def test_a_damaged_folder_says_to_start_anew(tmp_path, damaged):
    source = write_jsonl(tmp_path / "a.jsonl", [{}, *DOCUMENTS])
    process = start_slowly(tmp_path, input=[source], max_bad_lines=1)
    for _ in range(20):
        assert process.stdout.readline()
    process.kill()
    process.communicate()
    path = tmp_path / "out.partial" / damaged
    path.unlink() if damaged.endswith("lengths") else path.write_bytes(b"x")
    arguments = ["--input", source, "--output-prefix", tmp_path / "out", "--tokenizer-type", "ByteTokenizer"]
    done = run_tool("preprocess_data.py", *arguments, "--append-eod", "--max-bad-lines", 1)
    assert done.returncode == 1 and "keeps what is done" not in done.stderr, done.stderr
    assert damaged in done.stderr and f"delete {tmp_path / 'out.partial'} to start anew" in done.stderr


def test_a_file_in_the_way_is_not_called_progress(tmp_path):
    (tmp_path / "out.partial").touch()
    source = write_jsonl(tmp_path / "a.jsonl")
    done = run_tool("preprocess_data.py", "--input", source, "--output-prefix", tmp_path / "out",
                    "--tokenizer-type", "ByteTokenizer")  # fmt: skip
    assert done.returncode == 1 and "out.partial is no folder" in done.stderr and "keeps" not in done.stderr


def test_a_file_system_without_locks_is_told_and_used(tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    preprocess(config(tmp_path, write_jsonl(tmp_path / "a.jsonl")))
    assert "out.partial cannot be locked" in capsys.readouterr().err
    assert IndexedDataset(tmp_path / "out_text_document").num_documents == 400


@pytest.mark.parametrize("append_eod", [True, False])
@pytest.mark.parametrize("sentences", [True, False])
def test_a_text_without_tokens_is_a_bad_line(tmp_path, append_eod, sentences):
    if sentences:
        pytest.importorskip("sentencex")
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in ("1 2", " ", "4", "\n\t")])
    settings = config(tmp_path, source, tokenizer_type="NullTokenizer", vocab_size=9, append_eod=append_eod,
                      max_bad_lines=2, split_sentences=sentences)  # fmt: skip
    preprocess(settings)
    data = IndexedDataset(settings.prefix("text"))
    end = [8] if append_eod else []
    assert [data.sequence(i).tolist() for i in range(len(data))] == [[1, 2, *end], [4, *end]]
    rows = [line.split("\t")[1:] for line in (tmp_path / "out.bad_lines.tsv").read_text().splitlines()]
    assert rows == [["2", "the text gives no tokens"], ["4", "the text gives no tokens"]]


@pytest.mark.parametrize("language", ["english", "EN", ""])
def test_a_language_is_a_code(tmp_path, language):
    pytest.importorskip("sentencex")
    source = write_jsonl(tmp_path / "a.jsonl")
    (problem,) = find_problems(config(tmp_path, source, split_sentences=True, language=language))
    assert "needs an ISO 639 code" in problem


def test_an_interrupt_while_workers_start_is_one_line(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS * 20)
    command = [sys.executable, ROOT / "tools/preprocess_data.py", "--input", source, "--output-prefix",
               tmp_path / "out", "--tokenizer-type", "ByteTokenizer", "--workers", "3"]  # fmt: skip
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while len(children.read_text().split()) < 4:  # the workers, and what multiprocessing starts beside them
        assert process.poll() is None
    time.sleep(0.05)  # they import
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in said and said.endswith("error: interrupted\n"), said
    assert os.listdir(tmp_path) == ["a.jsonl"]
