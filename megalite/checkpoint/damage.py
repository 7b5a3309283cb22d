"""What is damaged in a checkpoint: everything is read and compared with what was written."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch

from megalite.checkpoint.folder import DamagedCheckpointError, open_regular, read_file
from megalite.checkpoint.format import PRIVATE_PREFIX, Index, StoredShard
from megalite.checkpoint.tensor_file import TensorFile
from megalite.checkpoint.text_files import StoredFile, compare_text


def damage(
    folder: Path, index: Index, progress: Callable[[int], object] = lambda done: None
) -> list[str]:
    """All damage of a checkpoint's files, and of its index: a line for each tensor or file.

    Calls `progress` with the bytes of each file that has been read.
    """
    problems = []
    shards_of: dict[str, list] = {name: [] for name in index.files}
    for name in index.tensors:
        try:
            tensor = index.tensors[name]
        except DamagedCheckpointError as error:
            problems.append(f"{folder}: {error}")
            continue
        problems += tensor.problems(name)
        for shard in tensor.shards:
            shards_of[shard.file].append((shard, tensor.dtype))
    for name, file in index.files.items():
        problems += _file_damage(folder / name, file, shards_of[name])
        progress(file.bytes)
    return problems


def compare_entry(file: TensorFile, shard: StoredShard, dtype: torch.dtype) -> None:
    """Raise DamagedCheckpointError unless the file holds the shard as the index says."""
    entry = file.entry(shard.key)
    found = (entry.shape, entry.dtype)
    expected = (shard.box.shape, dtype)
    if found != expected:
        difference = f"{shard.key} is {found}, the index says {expected}"
        raise DamagedCheckpointError(f"{file.path}: {difference}")


def _file_damage(
    path: Path, file: StoredFile, shards: list[tuple[StoredShard, torch.dtype]]
) -> list[str]:
    """What is wrong with one file. shards: those it should hold."""
    problems = []
    try:
        if file.sha256 is not None:
            _compare_sha256(path, file.sha256)
        if not shards and path.suffix != ".safetensors":
            compare_text(path, file, read_file(path))
            return problems
        content = TensorFile(path, file)
    except DamagedCheckpointError as error:
        return [str(error)]

    def check(key: str, checksums: str | None) -> None:
        if checksums is not None:
            content.check(key, checksums)

    checks = []
    for shard, dtype in shards:
        checks.append((compare_entry, (content, shard, dtype)))
        checks.append((check, (shard.key, shard.checksums)))
    for name, checksums in file.private.items():
        checks.append((check, (PRIVATE_PREFIX + name, checksums)))
    for action, arguments in checks:
        try:
            action(*arguments)
        except DamagedCheckpointError as error:
            problems.append(str(error))
    content.close()
    return problems


def _compare_sha256(path: Path, expected: str) -> None:
    digest = hashlib.sha256()
    try:
        with open(open_regular(path), "rb") as file:
            while chunk := file.read(1 << 24):
                digest.update(chunk)
    except OSError as error:
        raise DamagedCheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if digest.hexdigest() != expected:
        raise DamagedCheckpointError(f"{path} differs from its checksum")
