"""Inputs whose content is not what their name says, and folders that contain themselves."""

import bz2
import gzip
import io
import json
import lzma
import sys
import zipfile
from pathlib import Path

import pytest

from megalite.data.indexed import DatasetError
from megalite.preprocess.config import find_problems
from megalite.preprocess.content import file_problem
from megalite.preprocess.inputs import expand
from megalite.preprocess.run import preprocess
from tests.preprocess.preprocess_runs import config, flags, run_tool, write_jsonl

LINE = b'{"text": "some text"}\n'


def gzipped(content: bytes) -> bytes:
    """The same bytes every time: they are part of the names of tests."""
    return gzip.compress(content, mtime=0)


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.jsonl", LINE)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.jsonl", gzipped(LINE), "which its name does not say; rename it to {}.gz"),
        ("a.txt", lzma.compress(LINE), "which its name does not say; rename it to {}.xz"),
        ("a.jsonl", b"\x28\xb5\x2f\xfd....", "rename it to {}.zst"),
        ("a.jsonl", b"\x50\x2a\x4d\x18....", "rename it to {}.zst"),
        ("a.jsonl.gz", lzma.compress(LINE), "holds .xz data, which its name does not say"),
        ("a.jsonl", bz2.compress(LINE), "which its name does not say; unpack it, or convert"),
        ("a.jsonl", zipped(), "holds .zip data"),
        ("a.jsonl", b"PAR1\x15\x04", "holds .parquet data"),
        ("a.jsonl.gz", LINE, "named .gz, but it holds plain text; rename it, for example to "),
        ("a.parquet", LINE, "named .parquet, but it holds plain text"),
        ("a.jsonl.xz", b"\x01\x02\x03", "named .xz, but it does not start as .xz data does"),
        ("a.jsonl.gz", gzipped(gzipped(LINE)), "holds .gz data inside .gz; unpack"),
        ("a.jsonl", LINE.decode().encode("utf-16"), "convert it to UTF-8: iconv -f UTF-16"),
        ("a.txt", LINE.decode().encode("utf-32"), "encoded in UTF-32; convert"),
        ("a.jsonl", LINE.decode().encode("utf-16-le"), "encoded in UTF-16LE; convert"),
        ("a.jsonl", LINE.decode().encode("utf-16-be"), "encoded in UTF-16BE; convert"),
        ("a.jsonl.gz", gzipped(LINE.decode().encode("utf-16")), "encoded in UTF-16; convert"),
        ("a.jsonl.gz", LINE.decode().encode("utf-16"), "named .gz, but it holds plain text"),
    ],
)
def test_content_that_differs_from_the_name_is_reported(tmp_path, name, content, problem):
    path = tmp_path / name
    path.write_bytes(content)
    (found,) = find_problems(config(tmp_path, str(path)))
    assert found.startswith(f"--input {path}: ")
    assert problem.format(path) in found


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b""),
        ("a.jsonl", LINE),
        ("a.txt", b"PAR1 and BZh and Rar! are words"),
        ("a.txt", b"\xef\xbb\xbfwith a byte order mark"),
        ("a.txt", "né 你".encode()),
        ("a.jsonl.gz", gzipped(LINE)),
        ("a.jsonl.XZ", lzma.compress(LINE)),
        ("a.jsonl.gz", gzipped(LINE)[:12]),  # damaged: left to the reader
    ],
)
def test_sound_content_has_no_problem(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert file_problem(str(tmp_path / name)) is None


def test_standard_input_that_is_not_text_is_reported(tmp_path, monkeypatch):
    for content, problem in (
        (gzipped(LINE), "standard input: holds .gz data, not text; unpack it first"),
        (LINE.decode().encode("utf-16"), "standard input: encoded in UTF-16"),
    ):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        with pytest.raises(DatasetError, match=problem):
            preprocess(config(tmp_path, "-"))


def test_a_folder_with_a_link_to_itself_is_read_once(tmp_path):
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    source = write_jsonl(folder / "a.jsonl", [{"text": "a"}])
    other = write_jsonl(folder / "sub" / "b.jsonl", [{"text": "b"}])
    (folder / "loop").symlink_to(".")
    (folder / "sub" / "up").symlink_to("..")
    for name in (str(folder), str(folder / "**" / "*.jsonl")):
        assert expand((name,)) == ([source, other], [])
    # A link to another folder is followed.
    (tmp_path / "elsewhere").mkdir()
    third = write_jsonl(tmp_path / "elsewhere" / "c.jsonl", [{"text": "c"}])
    (folder / "more").symlink_to(tmp_path / "elsewhere")
    linked = str(folder / "more" / "c.jsonl")
    assert expand((str(folder),)) == ([source, linked, other], [])
    # The same file by two names is still an error, also through a link to a file.
    assert expand((str(folder), third))[1] == [f"--input {linked}: given twice"]


def test_empty_lines_and_texts_are_skipped_and_counted(tmp_path):
    lines = ["", '{"text": "a"}', "  ", '{"text": ""}', '{"text": "b"}', "bad", "", ""]
    source = tmp_path / "a.jsonl"
    source.write_text("\n".join(lines) + "\n")
    (tmp_path / "clean.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    preprocess(config(tmp_path, str(tmp_path / "clean.jsonl"), name="clean"))
    whole = (tmp_path / "clean_text_document.bin").read_bytes()
    for name, partitions in (("one", 1), ("two", 2)):
        reports = []
        settings = config(
            tmp_path,
            str(source),
            name=name,
            partitions=partitions,
            skip_empty=True,
            max_bad_lines=1,
        )
        preprocess(settings, reports.append)
        assert reports[-1].empty == 5 and reports[-1].bad_lines == 1
        assert (tmp_path / f"{name}_text_document.bin").read_bytes() == whole
        (row,) = (tmp_path / f"{name}.bad_lines.tsv").read_text().splitlines()
        assert row.split("\t")[1] == "6"


def test_skip_empty_resumes_a_run_that_an_empty_line_stopped(tmp_path):
    """The tool names the remedy, and says how many lines it left out."""
    source = tmp_path / "a.jsonl"
    source.write_text(json.dumps({"text": "a"}) + "\n\n")
    arguments = flags(tmp_path, source)
    done = run_tool("preprocess_data.py", *arguments)
    assert done.returncode == 1
    assert f"{source}, line 2: the line is empty (--skip-empty leaves it out)" in done.stderr
    done = run_tool("preprocess_data.py", *arguments, "--skip-empty")
    assert done.returncode == 0, done.stderr
    assert "1 blank lines or empty texts were left out (--skip-empty)" in done.stdout


def test_one_line_end_at_the_end_of_a_file_is_no_blank_line(tmp_path):
    for name, content in (("with", LINE * 2), ("without", (LINE * 2)[:-1])):
        (tmp_path / f"{name}.jsonl").write_bytes(content)
        preprocess(config(tmp_path, str(tmp_path / f"{name}.jsonl"), name=name))
    assert (
        Path(tmp_path / "with_text_document.bin").read_bytes()
        == (tmp_path / "without_text_document.bin").read_bytes()
    )
