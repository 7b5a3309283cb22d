"""Write weights: as a checkpoint of megalite, as a folder of Hugging Face, as one safetensors file.

Everything streams: one tensor is written while the next one is read.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from math import prod
from pathlib import Path
from typing import Any

import torch

from megalite.checkpoint.folder import CheckpointError
from megalite.checkpoint.format import MASTER, DeferredTensor, Shard
from megalite.checkpoint.save import write
from megalite.checkpoint.source import TensorSource
from megalite.checkpoint.tensor_file import write_file, write_tensors
from megalite.convert.pieces import PlacedPiece, place
from megalite.convert.published import CONFIG_JSON, GENERATION_JSON, INDEX_JSON, ONE_FILE, table_of
from megalite.convert.tables import Architecture
from megalite.parallel.boxes import Box
from megalite.parallel.context import ParallelContext

METADATA = {"format": "pt"}
"""Without it, transformers refuses a file."""


@dataclass(frozen=True)
class Weights:
    """The weights of a model, to be read in one dtype."""

    source: TensorSource
    names: tuple[str, ...]
    """Names of the model's parameters."""
    dtype: torch.dtype | None = None
    """None: as each is stored."""

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype in which a tensor is read."""
        return self.dtype or self.source.dtype(name)

    @property
    def bytes(self) -> int:
        """Of all tensors."""
        return sum(self.bytes_of(name) for name in self.names)

    def bytes_of(self, name: str) -> int:
        """Of one tensor."""
        return prod(self.source.shape(name)) * self.dtype_of(name).itemsize

    def deferred(self, name: str) -> DeferredTensor:
        """A tensor that is read when it is written."""
        shape = tuple(self.source.shape(name))
        return DeferredTensor(self.dtype_of(name), shape, partial(self.read, name))

    def read(self, name: str, box: Box | None = None) -> torch.Tensor:
        """One box of a tensor (None: all).

        A full precision is read from the fp32 master weights where they are stored. Raises
        CheckpointError when a finite number is beyond the range of the dtype.
        """
        wanted = self.dtype_of(name)
        stored = name
        if wanted.itemsize >= 4 and MASTER + name in self.source.names:
            stored = MASTER + name
        tensor = self.source.read(stored, box)
        if tensor.dtype == wanted:
            return tensor
        converted = tensor.to(wanted)
        if wanted == torch.float16 and (converted.isinf() & ~tensor.isinf()).any():
            largest = f"{tensor.abs().max().item():g}"
            raise CheckpointError(f"{name} has numbers up to {largest}, too large for fp16")
        return converted


def write_megalite(
    folder: Path, weights: Weights, *, iteration: int, state: dict[str, Any], config_yaml: str
) -> None:
    """Write a checkpoint of one rank into a folder of checkpoints."""
    shards = []
    for name in weights.names:
        tensor = weights.deferred(name)
        shards.append(Shard(name, tensor, tensor.shape, Box.whole(tensor.shape)))
    alone = ParallelContext.single().control
    write(folder, iteration, shards, private={}, state=state, config_yaml=config_yaml, world=alone)


def write_safetensors(folder: Path, weights: Weights, config_yaml: str) -> None:
    """Write all tensors, under megalite's names, into one file, and the configuration."""
    tensors = {name: weights.deferred(name) for name in weights.names}
    write_tensors(folder / ONE_FILE, tensors, METADATA)
    write_file(folder / "config.yaml", config_yaml.encode())


@dataclass(frozen=True)
class HuggingFaceModel:
    """What a folder of Hugging Face holds beside weights."""

    architecture: Architecture
    config: dict[str, Any]
    """Content of config.json."""
    generation: dict[str, Any] | None = None
    """Content of generation_config.json; None: there is none, as for a BERT."""
    tokenizer_files: dict[str, bytes] = field(default_factory=dict)

    def key_of(self, piece: PlacedPiece) -> str:
        """The name of a tensor: a class without an output layer leaves out the prefix."""
        absent = self.architecture.classes[self.config["architectures"][0]]
        if "output." in absent:
            return piece.theirs.removeprefix(self.architecture.prefix)
        return piece.theirs


def write_huggingface(
    folder: Path,
    weights: Weights,
    model: HuggingFaceModel,
    max_shard_bytes: int,
    log: Callable[[str], None],
) -> None:
    """Write a folder from which transformers loads the model, in files of at most
    `max_shard_bytes`, unless a single tensor is larger.

    Raises CheckpointError when the architecture has no place for one of the tensors.
    """
    shapes = {name: tuple(weights.source.shape(name)) for name in weights.names}
    placement = place(table_of(model.architecture), shapes)
    if placement.problems:
        kind = model.architecture.model_type
        names = ", ".join(placement.problems[:5])
        raise CheckpointError(f"{kind} of Hugging Face has no place for {names}")
    files = list(_files(placement.pieces, weights, max_shard_bytes))
    # The pieces of one of our tensors follow one another: it is read once for all of them.
    read_ours = lru_cache(maxsize=1)(weights.read)
    places = {}
    for number, pieces in enumerate(files, 1):
        name = ONE_FILE
        if len(files) > 1:
            name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        tensors = {}
        for piece in pieces:
            read = partial(_read_piece, read_ours, piece)
            key = model.key_of(piece)
            tensors[key] = DeferredTensor(weights.dtype_of(piece.ours), piece.shape, read)
            places[key] = name
        written, _ = write_tensors(folder / name, tensors, METADATA)
        log(f"  {name}: {len(tensors)} tensors, {written.bytes:,} bytes")
    if len(files) > 1:
        index = {"metadata": {"total_size": weights.bytes}, "weight_map": places}
        _write_json(folder / INDEX_JSON, index)
    _write_json(folder / CONFIG_JSON, model.config)
    if model.generation is not None:
        _write_json(folder / GENERATION_JSON, model.generation)
    for name, content in model.tokenizer_files.items():
        write_file(folder / name, content)


def _read_piece(read: Callable[[str], torch.Tensor], piece: PlacedPiece) -> torch.Tensor:
    """A tensor of theirs. read: gives one of ours by its name."""
    ours = read(piece.ours)
    return piece.as_theirs(ours[piece.box.slices_in(Box.whole(ours.shape))])


def _files(
    pieces: Iterator[PlacedPiece], weights: Weights, most: int
) -> Iterator[list[PlacedPiece]]:
    """The pieces of each file, in order."""
    here: list[PlacedPiece] = []
    size = 0
    for piece in pieces:
        more = piece.box.numel * weights.dtype_of(piece.ours).itemsize
        if here and size + more > most:
            yield here
            here = []
            size = 0
        here.append(piece)
        size += more
    if here:
        yield here


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_file(path, json.dumps(content, indent=2).encode() + b"\n")


def parameter_names(
    source: TensorSource, shapes: dict[str, tuple[int, ...]], absent: tuple[str, ...] = ()
) -> tuple[str, ...]:
    """The parameters of a model of these shapes, of which those that begin with one of `absent`
    may be missing. Raises CheckpointError that lists what the source does not hold."""
    names = []
    for name in shapes:
        if name in source.names or not name.startswith(absent):
            names.append(name)
    source.check_shapes({name: shapes[name] for name in names})
    return tuple(names)
