"""Read a checkpoint in any layout: a box is assembled from the stored shards it intersects."""

from collections.abc import Collection
from pathlib import Path

import torch

from megalite.checkpoint.damage import compare_entry, damage
from megalite.checkpoint.folder import (
    CONFIG_FILE,
    INDEX_FILE,
    STATE_FILE,
    DamagedCheckpointError,
    find_checkpoint,
    listing,
    parse_json,
    parse_text,
    read_file,
)
from megalite.checkpoint.format import (
    PRIVATE_PREFIX,
    Index,
    Shard,
    StoredShard,
    StoredTensor,
    rank_file,
)
from megalite.checkpoint.source import TensorSource
from megalite.checkpoint.tensor_file import TensorFile
from megalite.checkpoint.text_files import compare_text
from megalite.parallel.boxes import Box


class Checkpoint(TensorSource):
    """An open checkpoint, usable in a `with` block. Each rank may open it; nothing communicates.

    A file of tensors is opened when something is read from it. With `verify`, all that is read is
    compared with its checksums (format version 2; version 1 has none that can be compared while
    reading). Raises DamagedCheckpointError for a file that is missing, cannot be read or is not
    what was written.
    """

    def __init__(
        self, folder: Path, index: Index, state: dict, config_yaml: str, verify: bool = True
    ):
        self.folder = folder
        self.state = state
        """The JSON object given to `write`."""
        self.config_yaml = config_yaml
        self._index = index
        self._verify = verify
        self._open_files: dict[str, TensorFile] = {}

    @classmethod
    def open(cls, root: str | Path, step: int | None = None, verify: bool = True) -> "Checkpoint":
        """Open the latest checkpoint in `root`, or that of iteration `step`.

        `root` may also be the folder of one checkpoint (`SAVE/iter_0000100`). Raises
        CheckpointError when the checkpoint is not there or was written by a later version of
        megalite, DamagedCheckpointError when its index, state or configuration is damaged.
        """
        folder = find_checkpoint(Path(root), step)
        index = Index.from_json(read_file(folder / INDEX_FILE), folder / INDEX_FILE)
        texts = {}
        for name in (STATE_FILE, CONFIG_FILE):
            content = read_file(folder / name)
            compare_text(folder / name, index.files.get(name), content)
            texts[name] = parse_text(content, folder / name)
        state = parse_json(texts[STATE_FILE], folder / STATE_FILE)
        return cls(folder, index, state, texts[CONFIG_FILE], verify)

    def close(self) -> None:
        """Close the files; a later read opens them again."""
        for file in self._open_files.values():
            file.close()
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
    def names(self) -> Collection[str]:
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
        box = self._box(name, box)
        parts = self._parts(name, box)
        out = torch.empty(box.shape, dtype=stored.dtype)
        self._fill(out, box, parts)
        return out

    def read_into(self, shard: Shard) -> None:
        """Fill the shard's tensor, converted to its dtype and device.

        Raises CheckpointError when the tensor is not stored, or with another global shape.
        """
        self.check([shard])
        tensor = shard.tensor.detach()
        if tensor.device.type == "cpu" and tensor.dtype == self.dtype(shard.name):
            self._fill(tensor, shard.box, self._parts(shard.name, shard.box))
        else:
            tensor.copy_(self.read(shard.name, shard.box))

    def _parts(self, name: str, box: Box) -> list[tuple[StoredShard, Box]]:
        """The shards that hold a part of the box, and these parts. The files hold as many elements
        as are asked for, as is known before memory is allocated for them."""
        stored = self._stored(name)
        parts = []
        for shard in stored.shards:
            common = shard.box.intersect(box)
            if common:
                compare_entry(self._file(shard.file), shard, stored.dtype)
                parts.append((shard, common))
        filled = sum(common.numel for _, common in parts)
        if filled != box.numel:
            share = f"{filled} of the {box.numel} elements of {box}"
            raise DamagedCheckpointError(f"{self.folder}: {name}: {share} are stored")
        return parts

    def _fill(self, out: torch.Tensor, box: Box, parts: list[tuple[StoredShard, Box]]) -> None:
        for shard, common in parts:
            target = out[common.slices_in(box)]
            file = self._file(shard.file)
            file.read_box(shard.key, shard.box, shard.checksums, common, target)

    def private(self, rank: int, world_size: int) -> dict[str, torch.Tensor] | None:
        """The tensors that this rank alone stored; None when another number of ranks wrote the
        checkpoint."""
        if world_size != self.world_size:
            return None
        name = rank_file(rank)
        file = self._file(name)
        checksums = self._index.files[name].private
        tensors = {}
        for key, entry in file.entries.items():
            if key.startswith(PRIVATE_PREFIX):
                own = key.removeprefix(PRIVATE_PREFIX)
                tensor = torch.empty(entry.shape, dtype=entry.dtype)
                box = Box.whole(entry.shape)
                file.read_box(key, box, checksums.get(own), box, tensor)
                tensors[own] = tensor
        return tensors

    def verify(self) -> None:
        """Compare everything with its checksums, and every tensor's shards with its shape.

        Reads everything. Raises DamagedCheckpointError that lists all damage.
        """
        problems = damage(self.folder, self._index)
        if problems:
            raise DamagedCheckpointError(listing(f"{self.folder} is damaged:", problems))

    def _stored(self, name: str) -> StoredTensor:
        if name not in self._index.tensors:
            raise self._unknown(name)
        return self._index.tensors[name]

    def _file(self, name: str) -> TensorFile:
        if name not in self._open_files:
            if name not in self._index.files:
                raise DamagedCheckpointError(f"{self.folder / INDEX_FILE} does not list {name}")
            file = TensorFile(self.folder / name, self._index.files[name], self._verify)
            self._open_files[name] = file
        return self._open_files[name]
