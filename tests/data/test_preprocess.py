"""Preprocessing: the same bytes from any number of workers, whole files or none, and errors that name file and line."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from megalite.data import preprocess as module
from megalite.data.indexed import DatasetError, DatasetInfo, IndexedDataset
from megalite.data.preprocess import (
    BadLineError,
    Block,
    PreprocessConfig,
    find_problems,
    parse_block,
    preprocess,
    read_blocks,
)
from megalite.data.tokenizers import ByteTokenizer, train_sentencepiece

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
DOCUMENTS = [{"id": i, "text": f"Document {i}: né\n" * (i % 7), "title": f"t{i}"} for i in range(400)]


def write_jsonl(path, documents=DOCUMENTS):
    path.write_text(
        "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents), encoding="utf-8"
    )
    return str(path)


def config(tmp_path, *inputs, name="out", **changes):
    settings = {"tokenizer_type": "ByteTokenizer", "append_eod": True, "workers": 1, **changes}
    return PreprocessConfig(inputs, str(tmp_path / name), **settings)


def run_tool(tool, *arguments):
    command = [sys.executable, str(ROOT / "tools" / tool), *map(str, arguments)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)


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
        assert info == DatasetInfo("ByteTokenizer", 257, 256, ByteTokenizer.sha256, len(DOCUMENTS), data.num_tokens)
        assert DatasetInfo.read(tmp_path / f"out_{key}_document") == info
    assert len(reports) > 10 and reports[-1].bytes_done == reports[-1].bytes_total
    assert f"{len(DOCUMENTS)} documents" in str(reports[-1]) and "MB/s" in str(reports[-1])


def test_any_number_of_workers_writes_the_same_bytes(tmp_path):
    """Blocks are as large as they are in earnest: 5 MB make 5 of them."""
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": f"{i} " * (i % 1000)} for i in range(3500)])
    assert len(list(read_blocks([source]))) >= 5
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


@pytest.mark.parametrize("size", [1, 7, 100, 10_000])
def test_blocks_are_whole_lines_with_the_right_numbers(tmp_path, monkeypatch, size):
    monkeypatch.setattr(module, "BLOCK_BYTES", size)
    data = b"one\ntwo\n\nfour, a long one\r\nlast without an end"
    (tmp_path / "a").write_bytes(data)
    blocks = list(read_blocks([str(tmp_path / "a")]))
    assert b"".join(block.data for block in blocks) == data
    start = 0
    for block in blocks:
        assert block.first_line == 1 + data[:start].count(b"\n")
        start += len(block.data)
        assert block.data.endswith(b"\n") or block is blocks[-1]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "a"', "invalid JSON: Expecting ',' delimiter at column 13"),
        (b"", "the line is empty"),
        (b"  ", "the line is empty"),
        (b'{"text": "\xff"}', "not UTF-8: byte 0xff at column 11"),
        (b'{"txt": "a", "id": 3}', "no key 'text'; keys here: txt, id"),
        (b"{}", "no key 'text'; keys here: none"),
        (b'{"text": 3}', "'text' is int, not text"),
        (b'["text"]', "a JSON object is needed, not list"),
        (b'{"text": "\\ud800"}', "half of a surrogate pair"),
        (b"[" * 100_000, "cannot be read"),
        (b"9" * 10_000, "cannot be read"),
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


def test_lines_may_end_in_crlf_and_the_last_one_in_nothing():
    block = Block("a", 1, b'{"text": "x"}\r\n{"text": "y"}')
    assert parse_block(block, ("text",)) == [["x", "y"]]


def test_empty_input_is_an_error(tmp_path):
    with pytest.raises(DatasetError, match=r"a\.jsonl: no documents"):
        preprocess(config(tmp_path, write_jsonl(tmp_path / "a.jsonl", [])))
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_all_problems_are_reported_at_once_with_status_2(tmp_path):
    (tmp_path / "old_text_document.idx").touch()
    result = run_tool(
        "preprocess_data.py", "--input", tmp_path / "none.jsonl", tmp_path, "--output-prefix", tmp_path / "old",
        "--tokenizer-type", "SentencePieceTokenizer", "--workers", 0, "--json-keys", "text", "text",
    )  # fmt: skip
    assert result.returncode == 2
    errors = result.stderr.splitlines()
    assert all(error.startswith("error: ") for error in errors)
    for part in ("none.jsonl: no such file", "not a file", "old_text_document.idx exists", "needs --tokenizer-model",
                 "--workers 0: needs at least 1", "--json-keys text text"):  # fmt: skip
        assert sum(part in error for error in errors) == 1, (part, errors)
    assert os.listdir(tmp_path) == ["old_text_document.idx"]
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
    assert "400 documents" in result.stdout and "MB/s" in result.stderr
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
    assert result.returncode == 1 and "a.txt, line 2: not UTF-8" in result.stderr
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "t.model"]


RUN_FROM_PIPE = """
import sys
from megalite.data.preprocess import PreprocessConfig, preprocess
if __name__ == "__main__":
    source, prefix = sys.argv[1:]
    settings = PreprocessConfig((source,), prefix, "ByteTokenizer", append_eod=True, workers=2)
    preprocess(settings, lambda progress: print(progress, flush=True))
"""


def test_a_kill_in_the_middle_leaves_no_dataset_and_no_process(tmp_path):
    """The input is a pipe that never ends, so the kill always comes in the middle."""
    pipe, script = tmp_path / "pipe", tmp_path / "run.py"
    os.mkfifo(pipe)
    script.write_text(RUN_FROM_PIPE)
    process = subprocess.Popen(
        [sys.executable, script, pipe, tmp_path / "out"], env=ENVIRONMENT, stdout=subprocess.PIPE
    )
    line = json.dumps({"text": "x" * 10_000}).encode() + b"\n"
    stop = threading.Event()

    def feed():
        try:
            with pipe.open("wb") as writer:
                while not stop.is_set():
                    writer.write(line)
                    stop.wait(0.001)
        except BrokenPipeError:
            pass  # the reader was killed, as intended

    feeder = threading.Thread(target=feed)
    feeder.start()
    assert b"documents" in process.stdout.readline()
    children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    stop.set()
    feeder.join()
    assert list(tmp_path.glob(".out_text_document.bin.*.partial")) and not list(tmp_path.glob("out*"))
    assert len(children) >= 2
    deadline = time.monotonic() + 20
    while any(is_running(pid) for pid in children):
        assert time.monotonic() < deadline, "workers outlive the process that started them"
        time.sleep(0.02)
    settings = config(tmp_path, write_jsonl(tmp_path / "a.jsonl"))
    assert find_problems(settings) == [] and preprocess(settings)[0].documents == len(DOCUMENTS)


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
