"""Memory maps without descriptors, and blends of more datasets than a process may open files."""

import gc
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megalite.data.mapping import map_file
from megalite.preprocess.indexed_writer import IndexedWriter

ROOT = Path(__file__).parents[2]


def maps_of(path) -> int:
    """How often this process has mapped the file."""
    return len(re.findall(re.escape(str(path)) + "$", Path("/proc/self/maps").read_text(), re.M))


def test_a_map_is_the_files_bytes_read_only(tmp_path):
    (tmp_path / "a").write_bytes(bytes(range(250)) * 100)
    content = map_file(tmp_path / "a")
    assert content.dtype == np.uint8 and content.tobytes() == bytes(range(250)) * 100
    with pytest.raises(ValueError, match="read-only"):
        content[0] = 1
    (tmp_path / "empty").touch()
    assert len(map_file(tmp_path / "empty")) == 0


def test_a_map_lives_as_long_as_its_last_view(tmp_path):
    (tmp_path / "a").write_bytes(bytes(10_000))
    descriptors = os.listdir("/proc/self/fd")
    view = map_file(tmp_path / "a")[34:42].view("<i8")
    assert os.listdir("/proc/self/fd") == descriptors
    gc.collect()
    assert maps_of(tmp_path / "a") == 1 and view[0] == 0
    del view
    gc.collect()
    assert maps_of(tmp_path / "a") == 0


def test_errors_name_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"):
        map_file(tmp_path / "missing")
    with pytest.raises(OSError, match=re.escape(str(tmp_path))):
        map_file(tmp_path)


BLEND = """
import os, re, sys
from pathlib import Path
from megalite.data.build import blended, build_sources, data_state
from megalite.data.config import DataConfig
from megalite.nn.config import ModelConfig

words = [word for i in range(int(sys.argv[1])) for word in ("1", f"{sys.argv[2]}/x{i}")]
data = DataConfig(data_path=tuple(words), split="50,40,10")
model = ModelConfig(seq_length=8, vocab_size=257)
descriptors = os.listdir("/proc/self/fd")
sources = build_sources(data, model, 1, {"train": 40, "valid": 40, "test": 40})
state = data_state(data, model, 1, 40)
for split in sources.values():
    dataset = blended(split)
    [dataset[i] for i in range(400)]
assert os.listdir("/proc/self/fd") == descriptors
maps = re.findall("/x[0-9]+[.](?:bin|idx)$", Path("/proc/self/maps").read_text(), re.M)
assert len(maps) == len(set(maps)) == 2 * int(sys.argv[1]), len(maps)
print(len(state.sources))
"""


def test_a_blend_needs_no_descriptors_and_one_map_a_file(tmp_path):
    """130 datasets in three splits, in a process that may open 24 files."""
    random = np.random.default_rng(0)
    for i in range(130):
        with IndexedWriter(tmp_path / f"x{i}", "u2") as writer:
            for document in random.integers(0, 256, (10, 20)):
                writer.add_document(document)
            writer.finish()

    def lower_limit():
        resource.setrlimit(resource.RLIMIT_NOFILE, (24, 24))

    done = subprocess.run(
        [sys.executable, "-c", BLEND, "130", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        preexec_fn=lower_limit,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "130\n"


def test_programs_raise_the_soft_limit_of_open_files():
    script = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 128))\n"
        "from megalite.programs.start import start\n"
        "sys.argv[1:] = ['--version']\n"
        "try:\n    start()\nexcept SystemExit:\n    pass\n"
        "print(resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1:] == ["(128, 128)"], done.stderr
