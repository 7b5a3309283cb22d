"""Weights of Megatron-LM's legacy checkpoints under megalite's names and shapes, whatever tensor
and pipeline sizes wrote them."""

import itertools
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from megalite.checkpoint.folder import LATEST_FILE, CheckpointError, iteration_folder, listing
from megalite.convert.distcp import METADATA
from megalite.convert.megatron_dist import MegatronDistWeights
from megalite.convert.megatron_file import FILE_NAME, RankFile, read_rank_file
from megalite.convert.megatron_model import (
    COMPUTED,
    LAYER_PREFIXES,
    OTHER_MODELS,
    TIED_COPIES,
    Layout,
    source_of,
    stored_shape,
)
from megalite.convert.megatron_source import MegatronSource
from megalite.parallel.boxes import Box

SPLIT_AXIS: dict[Layout, int | None] = {
    "whole": None,
    "vocabulary": 0,
    "rows": 0,
    "columns": 1,
    "qkv": 0,
    "gate_up": 1,
}
"""The dim of megalite's shape that tensor-parallel ranks share."""
MAPPED_BYTES = 2**26
"""Bytes read of a stage's files before they are mapped again: until then, pages count as memory."""
RANK_FOLDER = re.compile(r"mp_rank_(?P<tensor>\d\d)(_(?P<stage>\d{3}))?")
LAYER = re.compile(rf"({'|'.join(map(re.escape, LAYER_PREFIXES))})(?P<layer>\d+)\.(?P<rest>.+)")

Kind = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype of a stored tensor."""
Catalogue = dict[tuple[int, str], Kind]
"""Of the tensors of a rank, by (chunk, key)."""
Location = tuple[int, int, str]
"""(stage, chunk, key)."""


@dataclass(frozen=True)
class Place:
    """Where a tensor is stored: under `key` in chunk `chunk` of each rank's file of a stage."""

    stage: int
    chunk: int
    key: str
    layout: Layout
    dtype: torch.dtype


class MegatronWeights(MegatronSource):
    """The weights of a GPT in a checkpoint of Megatron-LM's format torch.

    Files are mapped, not read; those of one pipeline stage are open at a time.

    Args:
        folder: one checkpoint, `iter_0000100`.
        vocab_size: entries of the vocabulary, where the checkpoint knows only the padded number.

    Raises CheckpointError, with all problems, when it cannot be read as one of megalite's models.
    """

    def __init__(self, folder: Path, vocab_size: int | None = None):
        super().__init__(folder)
        self._files = _rank_files(self.folder)
        self._tensor = len(self._files[0])
        self._open: tuple[int, list[RankFile]] | None = None
        self._unmapped = MAPPED_BYTES
        first = self._stage(0)[0]
        self.args = first.args
        self.iteration = first.iteration
        self._version = first.version
        problems = self._problems_of_sizes()
        for key, kind in OTHER_MODELS.items():
            if any(name.startswith(key) for name in first.chunks[0]):
                problems.append(f"the model is {kind}; only GPTs are read")
        self._set_model(self._tensor, vocab_size, problems)

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype. Raises CheckpointError when the name is unknown."""
        return self._place(name).dtype

    def read(self, name: str, box: Box | None = None) -> torch.Tensor:
        """One box of a tensor (None: all of it), put together from the shards of the ranks.

        Raises CheckpointError when the name is unknown or the box is outside the shape.
        """
        box = self._box(name, box)
        place: Place = self._place(name)
        shape = self._shapes[name]
        result = torch.empty(box.shape, dtype=place.dtype)
        for rank, file in enumerate(self._stage(place.stage)):
            share = self._share(shape, place.layout, rank)
            common = box.intersect(share)
            if common is None:
                continue
            stored = self._ours(file.chunks[place.chunk][place.key], share.shape, place.layout)
            result[common.slices_in(box)] = stored[common.slices_in(share)]
            if place.layout == "whole":
                break
        self._unmapped -= result.nbytes
        if self._unmapped < 0:
            self.close()
        return result

    def close(self) -> None:
        """Close the files; a later read opens them again."""
        self._open = None
        self._unmapped = MAPPED_BYTES

    def _stage(self, stage: int) -> list[RankFile]:
        """The files of a stage's tensor-parallel ranks."""
        if self._open is None or self._open[0] != stage:
            self.close()  # before the next are opened
            self._open = (stage, [read_rank_file(path) for path in self._files[stage]])
        return self._open[1]

    # Layouts.

    def _share(self, shape: tuple[int, ...], layout: Layout, rank: int) -> Box:
        """The box of a rank. That of a vocabulary may end after the tensor: with its padding."""
        axis = SPLIT_AXIS[layout]
        if axis is None:
            return Box.whole(shape)
        length = shape[axis]
        if layout == "vocabulary":
            length = self._padded_rows
        size = length // self._tensor
        offset = [0] * len(shape)
        offset[axis] = rank * size
        return Box(tuple(offset), (*shape[:axis], size, *shape[axis + 1 :]))

    @property
    def _padded_rows(self) -> int:
        return self.args.get("padded_vocab_size") or self.model.padded_vocabulary(self._tensor)

    def _ours(self, tensor: torch.Tensor, shape: tuple[int, ...], layout: Layout) -> torch.Tensor:
        """A rank's tensor as a view of megalite's shape."""
        if layout != "qkv" or self._version >= 2:
            return tensor.reshape(shape)
        # Older versions know no query groups: [heads, 3, size, ...] is the shape here.
        heads, three, size, *rest = shape
        if self._version >= 1:
            return tensor.reshape(heads, size, three, *rest).transpose(1, 2)
        return tensor.reshape(three, heads, size, *rest).transpose(0, 1)

    # What there is, and whether it fits.

    def _problems_of_sizes(self) -> list[str]:
        """Ranks whose files are missing or too many, and a version that is not known."""
        problems = []
        tensor = self.args.get("tensor_model_parallel_size", self.args.get("model_parallel_size"))
        stages = self.args.get("pipeline_model_parallel_size", len(self._files))
        for what, said, there in (
            ("tensor", tensor, self._tensor),
            ("pipeline", stages, len(self._files)),
        ):
            if said is not None and said != there:
                files = f"the files are those of {there}"
                problems.append(f"the {what}-parallel size in args is {said}, but {files}")
        if self._version not in (0, 1, 2, 3):
            problems.append(f"checkpoint version {self._version}: known are 0, 1, 2 and 3")
        if self._version < 2 and self.args.get("group_query_attention"):
            problems.append(f"checkpoint version {self._version} has no query groups")
        return problems

    def _find_all(self) -> list[str]:
        catalogue = self._catalogue()
        index = self._index(catalogue)
        problems = []
        for name, shape in self._shapes.items():
            layer, source = source_of(name, self.model.swiglu)
            spelt = [(layer, theirs) for theirs in source.names if (layer, theirs) in index]
            if not spelt:
                where = "" if layer is None else f" of layer {layer}"
                problems.append(f"{name}: no {' or '.join(source.names)}{where}")
                continue
            stage, chunk, key = index.pop(spelt[0])
            shards = [rank.get((chunk, key)) for rank in catalogue[stage]]
            problem = self._problem_of_shards(shape, source.layout, shards)
            if problem:
                problems.append(f"{name}, {key} of stage {stage}: {problem}")
            else:
                dtype = shards[0][1]
                self._places[name] = Place(stage, chunk, key, source.layout, dtype)
        for stage, _, key in index.values():
            problems.append(f"{key} of stage {stage}: megalite has no such tensor in this model")
        return problems

    def _catalogue(self) -> list[list[Catalogue]]:
        """What each stage's tensor-parallel ranks store."""
        stages = []
        for stage in range(len(self._files)):
            ranks = []
            for file in self._stage(stage):
                found = {}
                for chunk, tensors in enumerate(file.chunks):
                    for key, tensor in tensors.items():
                        if not key.endswith(COMPUTED):
                            found[chunk, key] = (tuple(tensor.shape), tensor.dtype)
                ranks.append(found)
            stages.append(ranks)
        return stages

    def _index(self, catalogue: list[list[Catalogue]]) -> dict[tuple[int | None, str], Location]:
        """Where the tensors of the first rank of each stage are: by layer, counted in the whole
        model, and name after that of the layer; by (None, name) where there is no layer."""
        last = len(catalogue) - 1
        index = {}
        first_layer = 0
        # Virtual stages come before the ranks: chunk 1 of the first stage follows chunk 0 of the
        # last.
        chunks = 1 + max(chunk for ranks in catalogue for chunk, _ in ranks[0])
        for chunk, stage in itertools.product(range(chunks), range(last + 1)):
            layers = 0
            for owner, key in catalogue[stage][0]:
                if owner != chunk:
                    continue
                match = LAYER.fullmatch(key)
                where = (stage, chunk, key)
                if match:
                    local = int(match["layer"])
                    layers = max(layers, local + 1)
                    index[first_layer + local, match["rest"]] = where
                elif not (self.model.tied and stage == last and key in TIED_COPIES):
                    index[None, key] = where
            first_layer += layers
        return index

    def _problem_of_shards(
        self, shape: tuple[int, ...], layout: Layout, shards: list[Kind | None]
    ) -> str:
        """Why the shards of the ranks are not a tensor of this shape; empty if they are."""
        axis = SPLIT_AXIS[layout]
        length = self._padded_rows if layout == "vocabulary" else shape[axis or 0]
        if axis is not None and length % self._tensor:
            return f"{length} cannot be divided by {self._tensor} tensor-parallel ranks"
        wanted = stored_shape(self._share(shape, layout, 0).shape, layout)
        for rank, shard in enumerate(shards):
            if shard is None:
                return f"tensor-parallel rank {rank} does not have it"
            if shard[0] != wanted:
                return f"rank {rank} has shape {shard[0]}, expected {wanted}"
            if shard[1] != shards[0][1]:
                return f"rank {rank} has {shard[1]}, rank 0 {shards[0][1]}"
        return ""


def open_weights(
    folder: str | Path, step: int | None = None, vocab_size: int | None = None
) -> MegatronWeights | MegatronDistWeights:
    """The weights of a checkpoint of Megatron-LM in either of its formats.

    Args:
        folder: the folder that Megatron-LM saved to, or one checkpoint in it.
        step: the iteration; None: the one that latest_checkpointed_iteration.txt names.
        vocab_size: entries of the vocabulary, where the checkpoint knows only the padded number.

    Raises CheckpointError, with all problems, when it cannot be read as one of megalite's models.
    """
    one = _checkpoint_folder(Path(folder), step)
    kind = MegatronDistWeights if (one / METADATA).is_file() else MegatronWeights
    return kind(one, vocab_size)


def _checkpoint_folder(root: Path, step: int | None) -> Path:
    """The folder of one checkpoint. Raises CheckpointError when it is not there."""
    folder = root
    if step is not None:
        folder = root / iteration_folder(step)
    elif (root / LATEST_FILE).is_file():
        latest = (root / LATEST_FILE).read_text().strip()
        if latest == "release":
            folder = root / latest
        elif latest.isdecimal():
            folder = root / iteration_folder(int(latest))
        else:
            raise CheckpointError(f"{root / LATEST_FILE} names no iteration: {latest!r}")
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder")
    return folder


def _rank_files(folder: Path) -> list[list[Path]]:
    """The file of each tensor-parallel rank of each pipeline stage. Raises CheckpointError."""
    found = {}
    for path in sorted(folder.glob(f"mp_rank_*/{FILE_NAME}")):
        match = RANK_FOLDER.fullmatch(path.parent.name)
        if match is None:
            raise CheckpointError(f"{path.parent}: checkpoints with expert ranks are not supported")
        found[int(match["stage"] or 0), int(match["tensor"])] = path
    if not found:
        raise CheckpointError(f"{folder} holds no mp_rank_XX/{FILE_NAME} of Megatron-LM")
    stages = 1 + max(stage for stage, _ in found)
    tensor = 1 + max(rank for _, rank in found)
    missing = []
    for place in itertools.product(range(stages), range(tensor)):
        if place not in found:
            missing.append("of tensor rank {1}, stage {0}".format(*place))
    if missing:
        raise CheckpointError(listing(f"{folder}: files are missing:", missing))
    return [[found[stage, rank] for rank in range(tensor)] for stage in range(stages)]
