"""Files that somebody else put there: nothing in them runs, nothing is waited for, and each is an
error that names the file."""

import json
import os
import struct
import zipfile

import pytest
import torch

from megalite.checkpoint.damage import damage
from megalite.checkpoint.fence import Lease
from megalite.checkpoint.folder import CheckpointError, DamagedCheckpointError, read_file
from megalite.checkpoint.format import Index, StoredFile
from megalite.checkpoint.inspection import inspect
from megalite.checkpoint.load import Checkpoint
from megalite.checkpoint.save import write
from megalite.checkpoint.tensor_file import TensorFile
from megalite.config import validate
from megalite.config.run import from_flat
from tests.checkpoint.helpers import ALONE, whole

WEIGHTS = "weights-00000.safetensors"
READ_BACK = ("index.json", "state.json", "config.yaml", WEIGHTS)
LATEST = "latest_checkpointed_iteration.txt"


@pytest.fixture
def saved(tmp_path):
    """A checkpoint with private tensors."""
    private = {"rng": torch.arange(9)}
    shards = [whole("w", torch.ones(5, 4)), whole("b", torch.ones(3))]
    write(tmp_path / "saved", 1, shards, private, {"iteration": 1}, "lr: 0.1\n", ALONE)
    return tmp_path / "saved"


def pickled(marker) -> bytes:
    """What torch.load without weights_only would run: it makes the file `marker`."""
    return b"cos\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR."


def replace(path, kind: str, marker) -> None:
    """Put something else in a file's place."""
    path.unlink(missing_ok=True)
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("archive/data.pkl", pickled(marker))
    else:
        content = {
            "pickle": pickled(marker),
            "html": b"<!doctype html><title>404</title>",
            "nothing": b"",
            "header of 2^63 bytes": struct.pack("<Q", 1 << 63) + b"{}",
            "deep": b"[" * 200_000,
            "a list": b"[1]",
            "long number": b'{"format_version": ' + b"9" * 10_000 + b"}",
            "no text": bytes(range(256)),
            "yaml object": f"a: !!python/object/apply:os.system ['touch {marker}']".encode(),
        }
        path.write_bytes(content[kind])


KINDS = (
    """
    folder pipe device loop zip pickle html nothing deep
""".split()
    + ["header of 2^63 bytes", "a list", "long number", "no text", "yaml object"]
)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_in_the_place_of_a_file_is_an_error(saved, tmp_path, kind):
    marker = tmp_path / "ran"
    folder = saved / "iter_0000001"
    for name in READ_BACK:
        before = (folder / name).read_bytes()
        replace(folder / name, kind, marker)
        with pytest.raises(DamagedCheckpointError, match=name):
            with Checkpoint.open(saved) as checkpoint:
                checkpoint.read("w")
        with pytest.raises(DamagedCheckpointError, match=name):
            with Checkpoint.open(saved) as checkpoint:
                checkpoint.private(0, 1)
        # The rules that read it before torch is loaded, and the tool for damaged checkpoints.
        validate.check(from_flat({"load": str(saved), "mock_data": True, "vocab_size": 9}), 1)
        found = inspect(folder)
        problems = damage(folder, found.index) if found.index else []
        assert any(name in line for line in [*found.problems, *problems])
        path = folder / name
        path.rmdir() if kind == "folder" else path.unlink()
        path.write_bytes(before)
    assert Checkpoint.open(saved).verify() is None
    assert not marker.exists()


@pytest.mark.parametrize("kind", KINDS)
def test_the_files_of_the_folder_too(saved, tmp_path, kind):
    marker = tmp_path / "ran"
    lease = Lease.take(saved)
    replace(saved / LATEST, kind, marker)
    replace(saved / "owner.json", kind, marker)
    with pytest.raises(DamagedCheckpointError, match=LATEST):
        Checkpoint.open(saved)
    assert validate.check(from_flat({"load": str(saved), "mock_data": True, "vocab_size": 9}), 1)
    with pytest.raises(ValueError, match=r"owner.json cannot be read"):
        lease.check()
    assert not marker.exists()


def header(entries: object) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + bytes(64)


def entry(**changes) -> dict:
    return {"dtype": "F32", "shape": [4], "data_offsets": [0, 16], **changes}


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"\0" * 7, "has 7 bytes"),
        (struct.pack("<Q", 1 << 63) + b"{}", "states a header of 9223372036854775808 bytes"),
        (struct.pack("<Q", 11) + b"{}", "states a header of 11 bytes, and has 10"),
        (header(b'{"w": {}, "w": {}}'), "'w' is there twice"),
        (header(b'{"w": {"dtype": "F32", "dtype": "F64"}}'), "'dtype' is there twice"),
        (header(b"[]"), "no JSON object"),
        (header({"w": 1}), "'w'.*should have dtype, shape and data_offsets"),
        (header({"w": entry(more=1)}), "should have dtype"),
        (header({"w": entry(dtype="F8_E4M3", data_offsets=[0, 64])}), "unknown dtype 'F8_E4M3'"),
        (header({"w": entry(shape=[-4])}), "-4 is no size"),
        (header({"w": entry(shape=[-2, -2])}), "-2 is no size"),
        (header({"w": entry(shape=[1 << 63, 2])}), "is no size"),
        (header({"w": entry(shape=[1 << 40, 1 << 40])}), "16 bytes for shape"),
        (header({"w": entry(shape=[1 << 61, 8])}), "16 bytes for shape"),
        (header({"w": entry(shape=[1] * 65)}), "65 dims"),
        (header({"w": entry(shape=[2.0, 2])}), "2.0 should be a whole number"),
        (header({"w": entry(shape=[True, 4])}), "True should be a whole number"),
        (header({"w": entry(shape="4")}), "should be a list"),
        (header({"w": entry(shape=[5])}), "16 bytes for shape"),
        (header({"w": entry(data_offsets=[0, 1 << 50])}), "bytes 0 to"),
        (header({"w": entry(data_offsets=[60, 76])}), "bytes 60 to 76 of 64"),
        (header({"w": entry(data_offsets=[16, 0])}), "bytes 16 to 0"),
        (header({"w": entry(data_offsets=[-16, 0])}), "-16 is no size"),
        (header({"w": entry(data_offsets=[0, 8, 16])}), "too many values"),
        (header({"a": entry(), "b": entry(data_offsets=[12, 28])}), "'a' and 'b' overlap"),
        (header({"a": entry(), "b": entry(data_offsets=[20, 36])}), "gap between 'a' and 'b'"),
        (header({"w": entry()}), "its last tensor ends at"),
    ],
)
def test_a_header_that_lies_is_an_error(tmp_path, content, text):
    path = tmp_path / WEIGHTS
    path.write_bytes(content)
    with pytest.raises(DamagedCheckpointError, match=text):
        TensorFile(path, StoredFile(len(content)))


def test_names_lead_nowhere_else(saved, tmp_path):
    """In index.json no name leads out of the folder; keys of tensors are no paths."""
    (tmp_path / "secret").write_text("secret")
    text = json.loads((saved / "iter_0000001" / "index.json").read_text())
    for name in ("../secret", "/etc/passwd", "a/../../secret", "..", "", "a\\b", "a\0b"):
        for version in (1, 2):
            files = {name: {"bytes": 6, "xxh3": "", "sha256": ""}}
            content = json.dumps({**text, "format_version": version, "files": files}).encode()
            with pytest.raises(CheckpointError):
                Index.from_json(content)
    path = tmp_path / WEIGHTS
    path.write_bytes(header({"../../secret": entry(shape=[16], data_offsets=[0, 64])}))
    assert TensorFile(path, None).entries.keys() == {"../../secret"}


def test_a_sparse_file_of_terabytes_is_not_read(tmp_path):
    with open(tmp_path / "index.json", "wb") as file:
        file.truncate(1 << 42)
    with pytest.raises(DamagedCheckpointError, match="4398046511104 bytes"):
        read_file(tmp_path / "index.json")
