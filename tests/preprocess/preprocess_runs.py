"""Small corpora, and preprocessing them."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

from megalite.preprocess.config import PreprocessConfig
from megalite.preprocess.inputs import read_blocks, shard_ranges

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
DOCUMENTS = [
    {"id": i, "text": f"Document {i}: né\n" * (1 + i % 7), "title": f"t{i}"} for i in range(400)
]


def write_jsonl(path, documents=DOCUMENTS):
    path.write_text(
        "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents),
        encoding="utf-8",
    )
    return str(path)


def config(tmp_path, *inputs, name="out", **changes):
    settings = {"tokenizer_type": "ByteTokenizer", "append_eod": True, "workers": 1, **changes}
    return PreprocessConfig(inputs, str(tmp_path / name), **settings)


def blocks_of(*files):
    return read_blocks(list(files), shard_ranges(list(files), 0, 1), ("text",))


def content(tmp_path, name, kind="document"):
    """The bytes of a dataset."""
    prefix = tmp_path / f"{name}_text_{kind}"
    return [Path(f"{prefix}{suffix}").read_bytes() for suffix in (".bin", ".idx", ".json")]


def flags(tmp_path, *inputs, name="out"):
    """Flags of preprocess_data.py."""
    prefix = ["--output-prefix", tmp_path / name]
    return ["--input", *inputs, *prefix, "--tokenizer-type", "ByteTokenizer"]


def run_tool(tool, *arguments, **settings):
    command = [sys.executable, str(ROOT / "tools" / tool), *map(str, arguments)]
    settings = {"env": ENVIRONMENT, "text": True, "timeout": 60, **settings}
    return subprocess.run(command, capture_output=True, **settings)


def limit_file_size():
    """Let every write beyond 50 kB fail: a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
