"""Every kind of input: the same documents, resumed anywhere, judged line by line, and
reported when damaged."""

import gzip
import importlib.util
import io
import json
import lzma
import os
import random
import sys
from pathlib import Path

import pytest

from megalite.data.indexed import DatasetError
from megalite.data.tokenizers import ByteTokenizer
from megalite.data.tokenizers.build import KINDS
from megalite.preprocess import inputs as module
from megalite.preprocess.config import find_problems
from megalite.preprocess.encode import Encoder, TextReader
from megalite.preprocess.inputs import expand, read_blocks, shard_ranges
from megalite.preprocess.run import preprocess, read_texts
from megalite.preprocess.shard import BadLineError
from tests.preprocess.preprocess_runs import (
    DOCUMENTS,
    blocks_of,
    config,
    content,
    flags,
    run_tool,
    write_jsonl,
)


@pytest.mark.parametrize("size", [1, 7, 100, 10_000])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_blocks_are_whole_lines_from_any_position_on(tmp_path, monkeypatch, size, suffix):
    monkeypatch.setattr(module, "BLOCK_BYTES", size)
    data = b"one\ntwo\n\nfour, a long one\r\nlast without an end"
    path = str(tmp_path / f"a{suffix}")
    (gzip.open if suffix else open)(path, "wb").write(data)
    blocks = list(blocks_of(path))
    assert b"".join(block.read() for block in blocks) == data
    for block in blocks:
        assert block.read() == data[block.start : block.stop] and (
            block.stop == len(data) or data[block.stop - 1] == 10
        )
        rest = read_blocks([path], shard_ranges([path], 0, 1), ("text",), (0, block.stop))
        assert b"".join(other.read() for other in rest) == data[block.stop :]


def test_lines_may_end_in_crlf_and_the_last_one_in_nothing():
    assert TextReader(("text",)).parse(b'{"text": "x"}\r\n{"text": "y"}', False) == (
        2,
        [["x", "y"]],
        [],
    )


AWKWARD_LINES = [
    b'{"text":"a"}',
    b'{"text":"b","x":{"y":[{"z":1},{}]}} \r',
    b'{"text":"c"}{"text":"d"}',
    b'{"text":"e"}\r{"text":"f"}',
    b'{"text":',
    b'"g"}',
    b'{"text":"h","x":[{}',
    b",{}]}",
    b'{"text":"i","x":"\xff"}',
    b'{"text":"j","\xff":1}',
    b"",
    b'{"text":"k","x":NaN}',
    b'{"text":"l","x":"\\ud800"}',
    b'{"text":"m","text":3}',
    b'{"text":3,"text":"n"}',
    b'{"text":"o","x":%s}' % (b"9" * 5000),
    b'{"text":"p","x":%s%s}' % (b"[" * 2000, b"]" * 2000),
    '{"text":"né 你"}'.encode(),
    b"{}",
    b'{"text":"q"},',
]


def test_a_line_is_judged_independent_of_its_neighbours():
    """Two objects on a line beside one on two, bytes that are not UTF-8 where nobody reads them,
    and more."""
    reader = TextReader(("text",))
    draw = random.Random(1)
    alone = {line: reader.parse(line + b"\n", False) for line in AWKWARD_LINES}
    assert [line for line, (_, _, bad) in alone.items() if bad] == [
        line
        for line in AWKWARD_LINES
        if not any(b'"%c"' % letter in line for letter in b"abklno") and "né".encode() not in line
    ]
    for _ in range(500):
        lines = draw.choices(AWKWARD_LINES, k=draw.randint(1, 4))
        texts = [text for line in lines for text in alone[line][1][0]]
        bad = []
        for number, line in enumerate(lines):
            if alone[line].bad:
                bad.append(alone[line].bad[0]._replace(number=number))
        assert reader.parse(b"\n".join(lines) + b"\n", False) == (len(lines), [texts], bad), lines


def compressors():
    """A function from bytes to one frame, by the suffix of files that hold such."""
    found = {".gz": gzip.compress, ".xz": lzma.compress}
    if importlib.util.find_spec("zstandard"):
        found[".zst"] = importlib.import_module("zstandard").compress
    return found


def write_every_kind(tmp_path) -> dict[str, str]:
    """DOCUMENTS in files of every kind, by a name for it: a file, a folder or a pattern."""
    plain = write_jsonl(tmp_path / "a.jsonl")
    data = Path(plain).read_bytes()
    lines = data.splitlines(True)
    kinds = {"plain": plain, "pattern": str(tmp_path / "*.jsonl")}
    for suffix, compress in compressors().items():
        kinds[suffix] = f"{plain}{suffix}"
        Path(kinds[suffix]).write_bytes(compress(data))
    if importlib.util.find_spec("pyarrow"):
        from pyarrow import Table, parquet

        kinds["parquet"] = str(tmp_path / "a.parquet")
        parquet.write_table(Table.from_pylist(DOCUMENTS), kinds["parquet"], row_group_size=150)
    for name in ("folder", "texts"):
        kinds[name] = str(tmp_path / name)
        (tmp_path / name).mkdir()
    (tmp_path / "folder" / "1.jsonl").write_bytes(b"".join(lines[:100]))
    (tmp_path / "folder" / "2.json.gz").write_bytes(gzip.compress(b"".join(lines[100:])))
    for number, document in enumerate(DOCUMENTS):
        text = document["text"].encode()
        path = tmp_path / "texts" / f"{number:03}.txt"
        path.write_bytes(text) if number % 2 else path.with_suffix(".txt.gz").write_bytes(
            gzip.compress(text)
        )
    return kinds


def test_every_kind_of_input_gives_the_same_dataset(tmp_path):
    kinds = write_every_kind(tmp_path)
    for name, source in kinds.items():
        preprocess(config(tmp_path, source, name=name))
        assert content(tmp_path, name) == content(tmp_path, "plain"), name
    arguments = [*flags(tmp_path, "-", name="stdin"), "--append-eod"]
    text = Path(kinds["plain"]).read_text(encoding="utf-8")
    done = run_tool("preprocess_data.py", *arguments, input=text, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert content(tmp_path, "stdin") == content(tmp_path, "plain")
    assert list(read_texts((kinds["texts"],), "text")) == [
        document["text"] for document in DOCUMENTS
    ]


def test_every_kind_of_input_is_resumed_after_any_block(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_BYTES", 1500)
    for name, source in write_every_kind(tmp_path).items():
        files, _ = expand((source,))
        ranges = shard_ranges(files, 0, 1)
        blocks = list(read_blocks(files, ranges, ("text",)))
        assert len(blocks) > 10
        for number, block in enumerate(blocks[:30], start=1):
            assert (
                list(read_blocks(files, ranges, ("text",), (block.file, block.stop)))
                == blocks[number:]
            ), name


@pytest.mark.parametrize("suffix", compressors())
def test_a_truncated_compressed_file_is_reported(tmp_path, suffix):
    """Two frames; cut between them it is a whole file of one."""
    path = str(tmp_path / f"a.jsonl{suffix}")
    compress = compressors()[suffix]
    line = json.dumps({"text": random.Random(1).randbytes(200).hex()}).encode() + b"\n"
    frames = compress(line), compress(line * 2)
    for cut in range(len(frames[0]) + len(frames[1])):
        Path(path).write_bytes(b"".join(frames)[:cut])
        if cut == len(frames[0]):
            assert [block.read() for block in blocks_of(path)] == [line]
            continue
        with pytest.raises(
            DatasetError, match=f"a.jsonl{suffix}: cannot be read to its end, damaged or cut short"
        ):
            list(blocks_of(path))
    for whole in (b"".join(frames), frames[0] + bytes(8) + frames[1] + bytes(4)):
        Path(path).write_bytes(whole)
        assert [block.read() for block in blocks_of(path)] == [line * 3]
    Path(path).write_bytes(frames[0] + b"no frame")
    with pytest.raises(DatasetError, match="cannot be read to its end"):
        list(blocks_of(path))


def test_a_missing_column_is_an_error(tmp_path):
    pytest.importorskip("pyarrow")
    from pyarrow import Table, parquet

    parquet.write_table(Table.from_pylist([{"body": "x"}]), tmp_path / "a.parquet")
    with pytest.raises(DatasetError, match="no column text; it has body"):
        preprocess(config(tmp_path, str(tmp_path / "a.parquet")))


def test_inputs_given_twice_and_bad_lines_of_standard_input_are_reported(tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "a.jsonl")
    (tmp_path / "b").symlink_to(tmp_path)
    again = str(tmp_path / "b" / "a.jsonl")
    assert f"--input {source}: given twice" in find_problems(config(tmp_path, source, again))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"text": "a"}\nb\n')))
    with pytest.raises(BadLineError, match="^standard input, line 2: invalid JSON"):
        preprocess(config(tmp_path, "-"))
    assert not (tmp_path / "out.partial").exists()


def test_the_reference_encodes_a_sample_of_every_file(tmp_path, monkeypatch):
    """Little of small files, so that many of them are not as slow as the reference."""
    checked = []

    class Checked(ByteTokenizer):
        def check(self, texts):
            checked.extend(texts)

    monkeypatch.setitem(KINDS, "ByteTokenizer", Checked)
    encoder = Encoder(config(tmp_path))
    for number, size in enumerate((10, 5000, 500_000)):
        (tmp_path / f"{number}.txt").write_text(str(number) * size)
    for block in blocks_of(*(str(tmp_path / f"{number}.txt") for number in range(3))):
        encoder(block)
    assert checked == ["0" * 10, "1" * 64, "2" * 500]


def parquet_of(path, column) -> str:
    """A file with a column `text`."""
    pytest.importorskip("pyarrow")
    from pyarrow import parquet, table

    parquet.write_table(table({"text": column}), path)
    return str(path)


def test_columns_of_bytes_are_utf8(tmp_path):
    import pyarrow as pa

    texts = ["hello", 'a "quoted" \\ line\n', "né 你"]
    source = parquet_of(
        tmp_path / "a.parquet", pa.array([text.encode() for text in texts], pa.binary())
    )
    assert list(read_texts((source,), "text")) == texts
    source = parquet_of(
        tmp_path / "b.parquet", pa.array([b"fine", b"a\xffb", None], pa.large_binary())
    )
    settings = config(tmp_path, source, max_bad_lines=2)
    preprocess(settings)
    bad = (tmp_path / "out.bad_lines.tsv").read_text().splitlines()
    assert "\t2\tnot UTF-8: byte 0xff" in bad[0] and "\t3\t'text' is NoneType" in bad[1]


def test_columns_of_text_may_be_dictionaries_and_others_are_refused(tmp_path):
    from datetime import datetime

    import pyarrow as pa

    source = parquet_of(tmp_path / "a.parquet", pa.array(["x", "y", "x"]).dictionary_encode())
    assert list(read_texts((source,), "text")) == ["x", "y", "x"]
    for name, column in (("time", [datetime(2020, 1, 1)]), ("number", [1]), ("list", [["a"]])):
        source = parquet_of(tmp_path / f"{name}.parquet", pa.array(column))
        with pytest.raises(DatasetError, match=f"{name}.parquet: column text holds .*, not text"):
            list(read_texts((source,), "text"))


def test_a_folder_is_read_recursively_and_ignored_files_are_reported(tmp_path):
    for name in (
        "a.txt",
        "sub/deep/b.txt",
        "C.JSONL",
        "d.JSONL.GZ",
        "e.ndjson",
        "f.md",
        ".g.txt",
        "sub/.h/i.txt",
    ):
        path = tmp_path / "raw" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        line = (
            json.dumps({"text": name}).encode() + b"\n" if "json" in name.lower() else name.encode()
        )
        path.write_bytes(gzip.compress(line) if name.endswith("GZ") else line)
    read = ["C.JSONL", "a.txt", "d.JSONL.GZ", "e.ndjson", "sub/deep/b.txt"]
    assert list(read_texts((str(tmp_path / "raw"),), "text")) == read
    assert list(read_texts((str(tmp_path / "raw" / "d.JSONL.GZ"),), "text")) == ["d.JSONL.GZ"]
    done = run_tool("preprocess_data.py", *flags(tmp_path, tmp_path / "raw"))
    assert done.returncode == 0
    ignored = tmp_path / "raw" / "f.md"
    assert f"ignored, not a known kind of file: {ignored}\n" in done.stderr


def test_unsupported_compression_and_pipes_are_refused(tmp_path):
    for name in ("a.jsonl.bz2", "b.ZIP"):
        (tmp_path / name).write_bytes(b"BZh")
        (problem,) = find_problems(config(tmp_path, str(tmp_path / name)))
        assert (
            f"{name}: {Path(name).suffix.lower()} is no known kind of compression: convert it to "
            "one of .gz" in problem
        )
    os.mkfifo(tmp_path / "pipe")
    (problem,) = find_problems(config(tmp_path, str(tmp_path / "pipe")))
    assert "not a file; pipe its output to --input -" in problem


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_text("x", encoding="utf-8-sig")
    (tmp_path / "b.jsonl").write_text('{"text": "y"}\n{"text": "z"}\n', encoding="utf-8-sig")
    assert list(read_texts((str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")), "text")) == [
        "x",
        "y",
        "z",
    ]
