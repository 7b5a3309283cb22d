"""Interrupted preprocessing: what remains, what is reported, and that it resumes."""

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

import pytest

from megalite.data.indexed import DatasetError, DatasetInfo, IndexedDataset
from megalite.preprocess import inputs as module
from megalite.preprocess.config import find_problems
from megalite.preprocess.journal import Journal
from megalite.preprocess.run import preprocess
from tests.preprocess.preprocess_runs import (
    DOCUMENTS,
    ENVIRONMENT,
    ROOT,
    config,
    content,
    flags,
    run_tool,
    write_jsonl,
)

SLOW_RUN = """
import json, sys, time
from megalite.preprocess import inputs, run, shard
if __name__ == "__main__":
    inputs.BLOCK_BYTES, shard.COMMIT_SECONDS = 500, -1.0
    def report(progress):
        print(progress.documents, flush=True)
        time.sleep(0.01)
    run.preprocess(run.PreprocessConfig(**json.loads(sys.argv[1])), report)
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
    return subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize(("suffix", "workers", "blocks"), [("", 1, 3), ("", 2, 40), (".gz", 1, 20)])
def test_a_killed_run_resumes_where_it_stopped(tmp_path, suffix, workers, blocks):
    first = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS[:150])
    second = write_jsonl(tmp_path / "b.jsonl", DOCUMENTS[150:])
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
    assert (
        not list(tmp_path.glob("out_text*"))
        and (tmp_path / "out.partial" / "journal.json").exists()
    )
    deadline = time.monotonic() + 20
    while any(is_running(int(pid)) for pid in children):
        assert time.monotonic() < deadline, "workers outlive the process that started them"
        time.sleep(0.02)
    other = config(tmp_path, *files, append_eod=False, max_bad_lines=2)
    with pytest.raises(
        DatasetError, match="which was another job: append eod was true, is false.* delete"
    ):
        preprocess(other)
    reports = []
    settings = config(tmp_path, *files, max_bad_lines=2)
    assert find_problems(settings) == []
    preprocess(settings, lambda progress: reports.append((progress.bytes_now, progress.bytes_done)))
    assert 0 < reports[-1][0] < reports[-1][1]  # the first blocks were kept
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


def test_what_a_failure_leaves_and_says(tmp_path):
    """A staging directory from which the same command resumes, and a line that says so; none where
    there is nothing to resume from."""
    source = write_jsonl(tmp_path / "a.jsonl")
    Path(source).write_text(Path(source).read_text() + "bad\n")
    arguments = flags(tmp_path, source)
    done = run_tool("preprocess_data.py", *arguments)
    assert done.returncode == 1 and "line 401" in done.stderr and "keeps" not in done.stderr
    assert os.listdir(tmp_path) == ["a.jsonl"]
    # Its shards have a bad line each; together they have more than --max-bad-lines.
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
        preprocess(
            config(tmp_path, str(tmp_path / "a.jsonl"), partitions=partitions, max_bad_lines=2)
        )
    assert os.listdir(tmp_path) == ["a.jsonl"]


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_worker_that_exits_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_BYTES", 1000)

    def kill_workers(_):
        for worker in multiprocessing.active_children():
            worker.kill()

    with pytest.raises(
        DatasetError, match=r"worker process exited unexpectedly \(exit code -9\).*fewer --workers"
    ):
        preprocess(config(tmp_path, write_jsonl(tmp_path / "a.jsonl"), workers=2), kill_workers)
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_a_list_of_bad_lines_is_not_overwritten(tmp_path):
    documents = [{"text": "a", "title": "b"}, {"other": "c"}]
    source = write_jsonl(tmp_path / "a.jsonl", documents)
    preprocess(config(tmp_path, source, max_bad_lines=1))
    settings = config(tmp_path, source, max_bad_lines=1, json_keys=("title",))
    assert any(
        "out.bad_lines.tsv exists; delete it" in problem for problem in find_problems(settings)
    )
    with pytest.raises(DatasetError, match=r"out\.bad_lines\.tsv exists already"):
        preprocess(settings)
    assert not (tmp_path / "out.partial").exists()


def test_the_index_gets_its_name_last(tmp_path, monkeypatch):
    """Who finds it finds everything, also the list of bad lines."""
    named = []
    monkeypatch.setattr(Journal, "publish", lambda journal: named.extend(journal.state["renames"]))
    monkeypatch.setattr(DatasetInfo, "read", lambda prefix: None)
    preprocess(
        config(tmp_path, write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}, {}]), max_bad_lines=1)
    )
    finals = [Path(final).name for _, final in named]
    assert "out.bad_lines.tsv" in finals and finals[-1] == "out_text_document.idx"


@pytest.mark.parametrize(
    "damaged", ["out_text_document.bin", "bad_lines.tsv", "out_text_document.lengths"]
)
def test_a_damaged_staging_directory_says_how_to_start_again(tmp_path, damaged):
    source = write_jsonl(tmp_path / "a.jsonl", [{}, *DOCUMENTS])
    process = start_slowly(tmp_path, input=[source], max_bad_lines=1)
    for _ in range(20):
        assert process.stdout.readline()
    process.kill()
    process.communicate()
    path = tmp_path / "out.partial" / damaged
    path.unlink() if damaged.endswith("lengths") else path.write_bytes(b"x")
    arguments = [*flags(tmp_path, source), "--append-eod", "--max-bad-lines", 1]
    done = run_tool("preprocess_data.py", *arguments)
    assert done.returncode == 1 and "keeps what is done" not in done.stderr, done.stderr
    assert (
        damaged in done.stderr
        and f"delete {tmp_path / 'out.partial'} to start again" in done.stderr
    )


def test_a_file_in_place_of_the_staging_directory_is_refused(tmp_path):
    (tmp_path / "out.partial").touch()
    source = write_jsonl(tmp_path / "a.jsonl")
    done = run_tool("preprocess_data.py", *flags(tmp_path, source))
    assert done.returncode == 1
    assert "out.partial is not a folder" in done.stderr and "keeps" not in done.stderr


def test_a_file_system_without_locks_is_reported_and_used(tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    preprocess(config(tmp_path, write_jsonl(tmp_path / "a.jsonl")))
    assert "out.partial cannot be locked" in capsys.readouterr().err
    assert IndexedDataset(tmp_path / "out_text_document").num_documents == 400


def test_an_interrupt_while_workers_start_is_one_line(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS * 20)
    command = [sys.executable, ROOT / "tools/preprocess_data.py", *flags(tmp_path, source)]
    command += ["--workers", "3"]
    process = subprocess.Popen(
        command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while (
        len(children.read_text().split()) < 4
    ):  # the workers, and what multiprocessing starts beside them
        assert process.poll() is None
    time.sleep(0.05)  # they import
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert (
        process.returncode == 1
        and "Traceback" not in said
        and said.endswith("error: interrupted\n")
    ), said
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_a_bad_line_is_one_row_also_with_line_ends_in_it(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}, {"a\nb\u2028c\td": 1}])
    for name, partitions in (("one", 1), ("two", 2)):
        preprocess(config(tmp_path, source, name=name, partitions=partitions, max_bad_lines=1))
        rows = (tmp_path / f"{name}.bad_lines.tsv").read_text().splitlines()
        assert rows == [f"{source}\t2\tno key 'text'; keys here: a b c\td"]
