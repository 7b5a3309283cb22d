"""A folder of Hugging Face: its configuration, its tensors and its tokenizer. Imports no torch.

Only config.json, the index and the headers of the safetensors files are read.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

from megalite.checkpoint.folder import CheckpointError, listing, read_json
from megalite.checkpoint.safetensors_header import ITEM_BYTES, StoredBytes, read_tensors
from megalite.checkpoint.untrusted import file_name_in
from megalite.convert.keys import Findings, Values
from megalite.convert.model_config import OWN_FIELDS, architecture_of, class_of, read_fields
from megalite.convert.pieces import Piece, PlacedPiece, model_shapes, place
from megalite.convert.tables import Architecture
from megalite.models.cost import HeadCost
from megalite.models.shapes import Shapes
from megalite.nn.config import ModelConfig

CONFIG_JSON = "config.json"
GENERATION_JSON = "generation_config.json"
INDEX_JSON = "model.safetensors.index.json"
ONE_FILE = "model.safetensors"


class PublishedError(CheckpointError):
    """A folder of Hugging Face is not one that megalite can read.

    Args:
        where: the folder, or the file in it.
        problems: all reasons.
        known: what config.json says, where these problems leave the shapes of the tensors known.
    """

    def __init__(self, where: Path, problems: list[str], known: "Published | None" = None):
        super().__init__(listing(f"{where}:", problems))
        self.where = where
        self.problems = problems
        self.known = known


@dataclass(frozen=True)
class Published:
    """What config.json says of a model, in our words."""

    folder: Path
    config: dict[str, Any]
    """The content of config.json."""
    architecture: Architecture
    class_name: str
    """Class of transformers that wrote it."""
    fields: Values
    """Fields of RunConfig that describe the model: those of ModelConfig and bert_pair."""
    notes: list[str] = field(default_factory=list)

    @property
    def model(self) -> ModelConfig:
        """The shape of the model."""
        own = {name: value for name, value in self.fields.items() if name in OWN_FIELDS}
        return ModelConfig(**own)

    def with_positions(self, longest: int) -> "Published | None":
        """The same model for sequences of up to this length. None where that is another model:
        learned positions are a table, and attention within a window differs beyond it."""
        if self.fields["position_embedding_type"] != "rope":
            return None
        key = "max_position_embeddings"
        config = {**self.config, key: longest}
        found = Findings()
        fields = read_fields(config, found)
        if fields.get(key) != longest:
            return None
        return replace(self, config=config, fields=fields, notes=found.notes)

    @property
    def absent(self) -> tuple[str, ...]:
        """Beginnings of our names that the class has no tensors for."""
        return self.architecture.classes[self.class_name]

    @property
    def shapes(self) -> Shapes:
        """Shapes of our parameters that the folder should hold."""
        shapes = model_shapes(self.model, head_of(self.architecture, self.fields))
        return {name: shape for name, shape in shapes.items() if not name.startswith(self.absent)}


def head_of(architecture: Architecture, fields: Values) -> HeadCost:
    """What the model has before and after its layers."""
    if architecture.ours == "gpt":
        return HeadCost()
    pairs = 0 if fields.get("bert_pair") == "none" else 2
    return HeadCost(token_types=2, dense=True, pair_classes=pairs)


def table_of(architecture: Architecture) -> tuple[Piece, ...]:
    """All lines of the mapping table."""
    return (*architecture.pieces, architecture.untied)


def read_published(folder: str | Path) -> Published:
    """Read config.json. Raises CheckpointError with everything that megalite cannot translate."""
    folder = Path(folder)
    config = read_json(folder / CONFIG_JSON)
    found = Findings()
    fields = read_fields(config, found)
    published = None
    if found.shapes_known:
        architecture = architecture_of(config)
        name = class_of(config, architecture)
        published = Published(folder, config, architecture, name, fields, found.notes)
    if found.problems:
        raise PublishedError(folder / CONFIG_JSON, found.problems, published)
    return published


@dataclass(frozen=True)
class StoredPiece:
    """A piece of one of our tensors and the bytes that hold it."""

    piece: PlacedPiece
    stored: StoredBytes


def find_tensors(
    published: Published, stored: dict[str, StoredBytes]
) -> dict[str, list[StoredPiece]]:
    """The pieces of each of our tensors, by its name. stored: every tensor of the folder, by key.

    Raises CheckpointError that lists every tensor that is missing, has another shape or dtype than
    config.json implies, or has no place in the model.
    """
    architecture = published.architecture
    placement = place(table_of(architecture), published.shapes)
    problems = [f"{name}: megalite's table has no line for it" for name in placement.problems]
    found = {}
    used = set()
    for name, pieces in placement.by_name.items():
        found[name] = []
        for piece in pieces:
            key = piece.theirs
            if key not in stored:
                key = key.removeprefix(architecture.prefix)
            if key not in stored:
                problems.append(f"{piece.theirs} is missing{_what_helps(piece, published)}")
                continue
            used.add(key)
            tensor = stored[key]
            if tensor.shape != piece.shape:
                problems.append(f"{key} has shape {tensor.shape}, config.json says {piece.shape}")
            elif tensor.dtype not in ITEM_BYTES or tensor.dtype[0] not in "BF":
                kinds = "F64, F32, F16 and BF16"
                problems.append(f"{key} is {tensor.dtype}; megalite reads {kinds}")
            found[name].append(StoredPiece(piece, tensor))
        if len({item.stored.dtype for item in found[name]}) > 1:
            problems.append(f"parts of {name} have several dtypes")
    # What would be left out silently.
    ignored = architecture.ignored
    if published.model.tied:
        ignored += (architecture.untied.theirs,)
    for key in stored.keys() - used:
        if not key.endswith(ignored):
            problems.append(f"{key} is no tensor of a {published.class_name}")
    if problems:
        raise PublishedError(published.folder, sorted(problems))
    return found


def _what_helps(piece: PlacedPiece, published: Published) -> str:
    """Where the output layer of a GPT is missing: why, and what to do."""
    architecture = published.architecture
    if piece.theirs != architecture.untied.theirs or architecture.ours != "gpt":
        return ""
    whole = next(iter(architecture.classes))
    why = f"a {published.class_name} has no output layer" if published.class_name != whole else ""
    said = '"tie_word_embeddings" is false in config.json, or left out'
    return (
        f": {why + ', and ' if why else ''}{said}. Where the embedding is the output layer too, "
        f'"tie_word_embeddings": true says so; otherwise save the model as a {whole}, with its '
        "output layer"
    )


@dataclass(frozen=True)
class PublishedFolder:
    """All of a folder but its weights."""

    published: Published
    stored: dict[str, StoredBytes]
    """Every tensor, by key."""
    pieces: dict[str, list[StoredPiece]]
    """Of each of our tensors, by its name."""


def read_folder(folder: str | Path) -> PublishedFolder:
    """Read config.json and the headers of the files. Raises one CheckpointError with everything in
    either that megalite cannot read."""
    folder = Path(folder)
    errors = []
    published = None
    stored = {}
    pieces = {}
    try:
        published = read_published(folder)
    except CheckpointError as error:
        errors.append(error)
        published = getattr(error, "known", None)
    try:
        stored = stored_tensors(folder)
        if published is not None:
            pieces = find_tensors(published, stored)
    except CheckpointError as error:
        errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise PublishedError(folder, list(chain.from_iterable(_within(folder, errors))))
    return PublishedFolder(published, stored, pieces)


def _within(folder: Path, errors: list[CheckpointError]) -> Iterator[list[str]]:
    """What each error says of a folder, without the folder's name."""
    for error in errors:
        if not isinstance(error, PublishedError):
            yield [str(error).removeprefix(str(folder)).lstrip("/: ")]
        elif error.where == folder:
            yield error.problems
        else:
            yield [f"{error.where.name}: {text}" for text in error.problems]


def stored_tensors(folder: Path) -> dict[str, StoredBytes]:
    """Every tensor of the folder's safetensors files by key. Raises CheckpointError."""
    if (folder / INDEX_JSON).exists():
        return _sharded(folder)
    if (folder / ONE_FILE).exists():
        return read_tensors(folder / ONE_FILE)
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    if pickles:
        again = "from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
        raise CheckpointError(
            f"{folder} holds {pickles[0]} and no {ONE_FILE}. A .bin file is a pickle, which can "
            "run code when it is read, and megalite reads none. Where you trust it, transformers "
            f"writes it again as safetensors: {again} of the class that {CONFIG_JSON} names"
        )
    raise CheckpointError(f"{folder} holds neither {ONE_FILE} nor {INDEX_JSON}")


def _sharded(folder: Path) -> dict[str, StoredBytes]:
    """The tensors that an index names. Raises CheckpointError."""
    index = folder / INDEX_JSON
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{index}: it has no weight_map")
    headers = {}
    for name in sorted(set(map(str, places.values()))):
        try:
            file = folder / file_name_in(name)
        except ValueError as error:
            raise CheckpointError(f"{index}: {error}") from None
        if file.suffix != ".safetensors":
            raise CheckpointError(f"{index}: {name} is no safetensors file")
        headers[name] = read_tensors(file)
    problems = []
    stored = {}
    for key, name in places.items():
        if key in headers[str(name)]:
            stored[key] = headers[str(name)][key]
        else:
            problems.append(f"{key} is not in {name}")
    for name, tensors in headers.items():
        for key in tensors:
            if places.get(key) != name:
                problems.append(f"{key} is in {name}, and the index does not say so")
    if problems:
        raise PublishedError(index, problems)
    return stored
