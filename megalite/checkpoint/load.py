"""Read a checkpoint in any layout: a box is assembled from the stored shards it intersects."""

import hashlib
import json
from collections.abc import KeysView
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from megalite.checkpoint.folder import (
    CONFIG_FILE,
    INDEX_FILE,
    STATE_FILE,
    CheckpointError,
    find_checkpoint,
)
from megalite.checkpoint.format import (
    PRIVATE_PREFIX,
    SAFETENSORS_DTYPES,
    Index,
    StoredShard,
    StoredTensor,
    listing,
    rank_file,
)
from megalite.checkpoint.source import TensorSource
from megalite.parallel.boxes import Box
from megalite.system.errors import error_message


class Checkpoint(TensorSource):
    """An open checkpoint, usable in a `with` block. Each rank may open it; nothing communicates."""

    def __init__(self, folder: Path, index: Index, state: dict, config_yaml: str):
        self.folder = folder
        self.state = state
        """The JSON object given to `write`."""
        self.config_yaml = config_yaml
        self._index = index
        self._open_files = {}

    @classmethod
    def open(cls, root: str | Path, step: int | None = None) -> "Checkpoint":
        """Open the latest checkpoint in `root`, or that of iteration `step`.

        `root` may also be the folder of one checkpoint (`SAVE/iter_0000100`). Raises
        CheckpointError when the checkpoint is not there, is damaged or of another format version,
        or when a file is missing or truncated.
        """
        folder = find_checkpoint(Path(root), step)
        try:
            index = Index.from_json((folder / INDEX_FILE).read_text())
            _compare_sizes(folder, index)
            state = json.loads((folder / STATE_FILE).read_text())
            return cls(folder, index, state, (folder / CONFIG_FILE).read_text())
        except CheckpointError as error:
            raise CheckpointError(f"{folder}: {error}") from error
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder} cannot be read: {error_message(error)}") from error

    def close(self) -> None:
        """Close the files; a later read opens them again."""
        self._open_files.clear()

    @property
    def iteration(self) -> int:
        """Iteration at which it was written."""
        return self._index.iteration

    @property
    def world_size(self) -> int:
        """Number of ranks that wrote it."""
        return self._index.world_size

    @property
    def names(self) -> KeysView[str]:
        """Names of all stored tensors (private ones aside)."""
        return self._index.tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Global shape."""
        return self._stored(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype."""
        return self._stored(name).dtype

    def read(self, name: str, box: Box | None = None) -> torch.Tensor:
        """One box of a tensor (None: all of it), on the CPU, in the stored dtype.

        Raises CheckpointError when the name is unknown or the box is outside the stored shape.
        """
        stored = self._stored(name)
        box = Box.whole(stored.shape) if box is None else box
        where = f"{self.folder}: {name}"
        if not box.lies_within(stored.shape):
            raise CheckpointError(f"{where} has shape {stored.shape}; {box} does not lie in it")
        out = torch.empty(box.shape, dtype=stored.dtype)
        filled = 0
        for shard in stored.shards:
            common = shard.box.intersect(box)
            if common:
                source = self._slice(shard, stored.dtype)
                out[common.slices_in(box)] = source[common.slices_in(shard.box)]
                filled += common.numel
        if filled != box.numel:
            share = f"{filled} of the {box.numel} elements of {box}"
            raise CheckpointError(f"{where}: {share} are stored")
        return out

    def private(self, rank: int, world_size: int) -> dict[str, torch.Tensor] | None:
        """The tensors that this rank alone stored; None when another number of ranks wrote the
        checkpoint."""
        if world_size != self.world_size:
            return None
        file = self._file(rank_file(rank))
        tensors = {}
        for key in file.keys():
            if key.startswith(PRIVATE_PREFIX):
                tensors[key.removeprefix(PRIVATE_PREFIX)] = file.get_tensor(key).clone()
        return tensors

    def verify(self) -> None:
        """Compare every file's SHA-256 with the index, and every tensor's shards with its shape.

        Reads everything. Raises CheckpointError that lists all damage.
        """
        problems = []
        for name, tensor in self._index.tensors.items():
            problems += tensor.problems(name)
        for name, file in self._index.files.items():
            if _sha256(self.folder / name) != file.sha256:
                problems.append(f"{name}: its checksum differs from the index")
        if problems:
            raise CheckpointError(listing(f"{self.folder} is damaged:", problems))

    def _stored(self, name: str) -> StoredTensor:
        if name not in self._index.tensors:
            raise CheckpointError(f"{self.folder}: {name} is not stored{self._nearest(name)}")
        return self._index.tensors[name]

    def _file(self, name: str):
        if name not in self._open_files:
            try:
                self._open_files[name] = safe_open(self.folder / name, framework="pt")
            except OSError as error:
                raise CheckpointError(error_message(error)) from error
            except SafetensorError as error:
                raise CheckpointError(f"{self.folder / name} cannot be read: {error}") from error
        return self._open_files[name]

    def _slice(self, shard: StoredShard, dtype: torch.dtype):
        """A stored tensor, read when it is indexed. Its shape and dtype are those of the index."""
        try:
            data = self._file(shard.file).get_slice(shard.key)
        except SafetensorError as error:
            raise CheckpointError(f"{self.folder / shard.file}: {error}") from error
        found = (tuple(data.get_shape()), data.get_dtype())
        expected = (shard.box.shape, SAFETENSORS_DTYPES[dtype])
        if found != expected:
            difference = f"{shard.key} is {found}, the index says {expected}"
            raise CheckpointError(f"{self.folder / shard.file}: {difference}")
        return data


def _compare_sizes(folder: Path, index: Index) -> None:
    problems = []
    for name, file in index.files.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != file.bytes:
            problems.append(f"{name} has {path.stat().st_size} bytes instead of {file.bytes}")
    if problems:
        raise CheckpointError("; ".join(problems))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 24):
            digest.update(chunk)
    return digest.hexdigest()
