"""Convert weights between megalite, Hugging Face and other formats.

    python tools/convert_checkpoint.py --from hf --to megalite --load Llama-3.1-8B --save llama
    python tools/convert_checkpoint.py --from megalite --to hf --load checkpoints --save my-model
    python tools/convert_checkpoint.py --from megatron --to megalite --vocab-size 50257 --load old
        --save new

A tensor is read while the one before it is written: two are in memory. --save must be a new
folder; it appears when it is complete. To train from a folder of Hugging Face, no conversion is
needed: pretrain_gpt.py --load-hf FOLDER.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from megalite.config.cli import parse_options
from megalite.config.run import RunConfig, to_flat, with_values
from megalite.config.yaml_file import to_yaml
from megalite.convert.tables import ARCHITECTURES, Architecture
from megalite.fields import Field
from megalite.programs.reporting import failures_reported
from megalite.system.errors import size_text

if TYPE_CHECKING:
    from megalite.checkpoint.folder import CheckpointError
    from megalite.checkpoint.source import TensorSource
    from megalite.convert.published import Published
    from megalite.convert.write import HuggingFaceModel, Weights
    from megalite.data.tokenizers import Tokenizer

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to convert."""

    from_format: Annotated[Literal["hf", "megatron", "megalite"], Field(aliases=("--from",))]
    """Format of --load: hf, a folder of Hugging Face with config.json and safetensors files;
    megatron, a folder of Megatron-LM's checkpoints; megalite, a folder of checkpoints."""
    to: Literal["megalite", "hf", "safetensors"]
    """Format of --save: megalite, a folder of checkpoints; hf, a folder that transformers loads;
    safetensors, one file with megalite's names."""
    load: str
    """Folder to read."""
    save: str
    """Folder to write, which must not exist yet, or be empty."""
    ckpt_step: Annotated[int | None, Field(minimum=0)] = None
    """With --from megalite or megatron: iteration to convert. Unset: the latest."""
    vocab_size: Annotated[int | None, Field(minimum=1, example=50257)] = None
    """With --from megatron: entries of the vocabulary. Its checkpoints know the padded number."""
    dtype: Literal["fp32", "fp16", "bf16"] | None = None
    """Type of the numbers to write. Unset: as they are stored."""
    max_shard_size: Annotated[str, Field(example="5GB")] = "5GB"
    """With --to hf: largest file of weights: a number and KB, MB, GB, KiB, MiB or GiB."""
    hf_model_type: Literal[tuple(ARCHITECTURES)] | None = None
    """With --to hf: the architecture to write. Unset: that of the folder that the weights came
    from, or the first of these that can express the model."""

    @property
    def shard_bytes(self) -> int | None:
        """--max-shard-size in bytes; None where it is no size."""
        match = re.fullmatch(r"(\d+)([A-Za-z]*)", self.max_shard_size.replace(" ", ""))
        unit = UNITS.get(match[2].upper()) if match else None
        return int(match[1]) * unit or None if unit else None

    @cached_property
    def opened(self) -> "Opened":
        """--load, open; no weight has been read. Raises CheckpointError."""
        return SOURCES[self.from_format](self)

    @cached_property
    def weights(self) -> "Weights":
        """What is to be written. Raises CheckpointError that lists what is not there."""
        import torch

        from megalite.convert.pieces import model_shapes
        from megalite.convert.write import Weights, parameter_names

        opened = self.opened
        shapes = model_shapes(opened.config.model, opened.config.head_cost)
        names = parameter_names(opened.source, shapes, opened.absent)
        dtype = getattr(torch, DTYPES[self.dtype]) if self.dtype else None
        return Weights(opened.source, names, dtype)

    @cached_property
    def huggingface(self) -> "HuggingFaceModel":
        """With --to hf: what is to be written beside the weights. Raises CheckpointError."""
        return huggingface_model(self, self.opened)

    def problems(self) -> Iterator[str]:
        """What is wrong with these values, and with the folders that they name, each with a fix.
        Reads no weights."""
        from megalite.convert.draft import folder_problem
        from megalite.convert.formats import FORMATS, formats_in

        problem = folder_problem(Path(self.save))
        if problem:
            yield f"--save {problem}"
        if self.shard_bytes is None:
            yield f"--max-shard-size {self.max_shard_size}: no size; for example 5GB"
        if self.ckpt_step is not None and self.from_format == "hf":
            yield "--ckpt-step is for --from megalite or megatron; leave it out"
        if self.vocab_size is not None and self.from_format != "megatron":
            yield "--vocab-size is for --from megatron; leave it out"
        if self.to != "hf":
            if self.hf_model_type is not None:
                yield "--hf-model-type is for --to hf; leave it out"
            if self.max_shard_size != "5GB":
                yield "--max-shard-size is for --to hf; leave it out"
        # The folder.
        load = Path(self.load)
        there = formats_in(load)
        if load.is_file():
            yield f"--load {load} is a file: give the folder that holds it, --load {load.parent}"
        elif not load.is_dir():
            yield f"--load {load}: there is no such folder"
        elif there and self.from_format not in there:
            yield f"--load {load} holds {FORMATS[there[0]]}: --from {there[0]}"
        else:
            yield from problems_of_source(self)


@dataclass(frozen=True)
class Opened:
    """Weights to convert and what is known about them."""

    source: "TensorSource"
    config: RunConfig
    """The configuration of the model and of its tokenizer."""
    title: str
    """What it is, for a person."""
    iteration: int = 0
    absent: tuple[str, ...] = ()
    """Beginnings of the names of parameters that may be missing."""
    origins: tuple[Path, ...] = ()
    """Folders in which the config.json of a published model may be, from which this model came."""
    files: tuple[Path, ...] = ()
    """Files that are kept beside the weights: those of the tokenizer, and config.json."""
    published: Path | None = None
    """The one of them that the run named with --load-hf."""
    compare: Callable[[], None] | None = None
    """Compares what is stored twice. Raises CheckpointError."""
    notes: list[str] = field(default_factory=list)

    @cached_property
    def tokenizer(self) -> "Tokenizer | None":
        """The tokenizer. None without one, or where it cannot be used, which becomes a note."""
        from megalite.data.tokenizers import TokenizerError, configured_tokenizer

        data = self.config.data
        if data.tokenizer_type is None:
            return None
        try:
            return configured_tokenizer(data, self.config.model.vocab_size)
        except TokenizerError as error:
            self.notes.append(f"the tokenizer cannot be used: {error}")
            return None


def open_huggingface(options: Options) -> Opened:
    """A folder of Hugging Face."""
    from megalite.convert.huggingface import HuggingFaceWeights
    from megalite.convert.published import read_folder
    from megalite.convert.tokenizer_files import kept_paths, tokenizer_of

    source = HuggingFaceWeights(read_folder(options.load))
    published = source.published
    tokenizer = tokenizer_of(source.folder)
    notes = list(published.notes)
    if not tokenizer:
        none = f"{source.folder} has no tokenizer.json, and no other that we read"
        notes.append(f"without a tokenizer: {none}")
    return Opened(
        source,
        _configuration(published.fields | tokenizer),
        title=f"{published.class_name} in {options.load}",
        absent=published.absent,
        origins=(source.folder,),
        files=tuple(kept_paths(source.folder)),
        compare=source.check_tied,
        notes=notes,
    )


def open_megatron(options: Options) -> Opened:
    """A checkpoint of Megatron-LM."""
    from megalite.convert.megatron import open_weights

    source = open_weights(options.load, options.ckpt_step, options.vocab_size)
    return Opened(
        source,
        with_values(RunConfig(), asdict(source.model)),
        title=f"iteration {source.iteration} of Megatron-LM in {options.load}",
        notes=["without a tokenizer: give its flags to the programs that use the model"],
    )


def open_megalite(options: Options) -> Opened:
    """A checkpoint of megalite."""
    from megalite.checkpoint.load import Checkpoint
    from megalite.config.yaml_file import config_of_checkpoint
    from megalite.data.tokenizers import TokenizerError, checkpoint_data_config

    source = Checkpoint.open(options.load, options.ckpt_step)
    config = config_of_checkpoint(source.config_yaml)
    notes = []
    try:
        data = checkpoint_data_config(config.data, {}, source.folder)
        config = with_values(config, {field: getattr(data, field) for field in _TOKENIZER})
    except TokenizerError as error:
        notes.append(f"without a tokenizer: {error}")
        config = with_values(config, dict.fromkeys(_TOKENIZER))
    absent = ()
    if config.model.architecture == "bert" and "mlm_head.dense.weight" not in source.names:
        absent = ARCHITECTURES["bert"].classes["BertModel"]
    origins = [source.folder.absolute().parent]
    published = Path(config.checkpoint.load_hf) if config.checkpoint.load_hf else None
    if published is not None:
        origins.append(published)
    return Opened(
        source,
        config,
        title=f"iteration {source.iteration} of {options.load}",
        iteration=source.iteration,
        absent=absent,
        origins=tuple(origins),
        published=published,
        notes=notes,
    )


_TOKENIZER = ("tokenizer_type", "tokenizer_model", "vocab_file", "merge_file", "tiktoken_pattern")
SOURCES: dict[str, Callable[[Options], Opened]] = {
    "hf": open_huggingface,
    "megatron": open_megatron,
    "megalite": open_megalite,
}
"""What opens --load, by --from."""


def _configuration(values: dict[str, Any]) -> RunConfig:
    """The configuration of a model that comes with these fields."""
    longest = values["max_position_embeddings"]
    usual = RunConfig().model.seq_length
    return with_values(RunConfig(), {"seq_length": min(usual, longest), **values})


def problems_of_source(options: Options) -> Iterator[str]:
    """Why what is in --load cannot be written as --to into --save."""
    from megalite.checkpoint.folder import CheckpointError
    from megalite.convert.draft import check_space

    try:
        opened = options.opened
        size = options.weights.bytes
    except CheckpointError as error:
        yield from _lines(error)
        return
    tokenizer = opened.tokenizer
    rows = opened.config.model.vocab_size
    if tokenizer is not None and tokenizer.vocab_size > rows:
        sizes = f"the tokenizer has {tokenizer.vocab_size} entries, the model in {options.load}"
        files = ", ".join(_files_of_tokenizer(opened.config))
        yield f"{sizes} {rows}: use the one that it was trained with, in place of {files}"
    try:
        if options.to == "hf":
            _ = options.huggingface
    except CheckpointError as error:
        yield from _lines(error)
    try:
        check_space(Path(options.save), size)
    except CheckpointError as error:
        yield f"--save {error}"


def _lines(error: "CheckpointError") -> list[str]:
    """All that an error lists, each with what it is about."""
    first, *rest = str(error).splitlines()
    return [f"{first} {line.strip()}" for line in rest] or [first]


def _files_of_tokenizer(config: RunConfig) -> Iterator[str]:
    """Names of the files that the tokenizer is made of."""
    for key in ("tokenizer_model", "vocab_file", "merge_file"):
        if getattr(config.data, key) is not None:
            yield getattr(config.data, key)


def convert(options: Options) -> None:
    """Write --save. options: without problems."""
    from megalite.convert.draft import new_folder

    opened = options.opened
    with closing(opened.source):
        weights = options.weights
        amount = f"{len(weights.names)} tensors, {size_text(weights.bytes)} to write"
        print(f"{opened.title}: {amount}", flush=True)
        # Both may add notes.
        _ = opened.tokenizer
        _ = options.to == "hf" and options.huggingface
        for note in opened.notes:
            print(f"  {note}", flush=True)
        if opened.compare is not None:
            opened.compare()
        save = Path(options.save)
        with new_folder(save) as draft:
            DESTINATIONS[options.to](options, draft)
        print(f"{save}: {options.to}, {size_text(sum_of_sizes(save))}")


def to_megalite(options: Options, draft: Path) -> None:
    """Write a checkpoint, and the tokenizer's files beside it."""
    import shutil

    from megalite import __version__
    from megalite.checkpoint.format import dtype_name
    from megalite.convert.write import write_megalite

    opened = options.opened
    weights = options.weights
    save = Path(options.save).absolute()
    values = {}
    for path in opened.files:
        shutil.copyfile(path, draft / path.name)
        for key in _TOKENIZER:
            if getattr(opened.config.data, key) == str(path):
                values[key] = str(save / path.name)
    first = dtype_name(weights.dtype_of(weights.names[0]))
    precisions = {long: short for short, long in DTYPES.items()} | {"float64": "fp64"}
    values |= {"precision": precisions[first], "save": None, "load": None}
    state = {
        "iteration": opened.iteration,
        "consumed_samples": 0,
        "optimizer": None,
        "converted_from": f"{options.from_format} {options.load}",
        "megalite": __version__,
    }
    write_megalite(
        draft,
        weights,
        iteration=opened.iteration,
        state=state,
        config_yaml=to_yaml(with_values(opened.config, values)),
    )


def to_safetensors(options: Options, draft: Path) -> None:
    """Write one file and the configuration."""
    from megalite.convert.write import write_safetensors

    write_safetensors(draft, options.weights, to_yaml(options.opened.config))


def to_huggingface(options: Options, draft: Path) -> None:
    """Write a folder that transformers loads."""
    from megalite.convert.write import write_huggingface

    model = options.huggingface
    print(f"  as {model.config['architectures'][0]}", flush=True)
    write_huggingface(draft, options.weights, model, options.shard_bytes, log=print)


def huggingface_model(options: Options, opened: Opened) -> "HuggingFaceModel":
    """config.json, generation_config.json and the tokenizer's files.

    Where the model is that of a published config.json, that one is written again. What is lost
    otherwise becomes a note. Raises CheckpointError when no architecture can express the model.
    """
    from megalite.checkpoint.folder import CheckpointError, read_json
    from megalite.checkpoint.format import dtype_name
    from megalite.convert.model_config import architecture_for
    from megalite.convert.published import CONFIG_JSON, GENERATION_JSON
    from megalite.convert.write import HuggingFaceModel

    files = _tokenizer_files(opened)
    dtype = dtype_name(options.weights.dtype_of(options.weights.names[0]))
    origin = _origin(opened, options.hf_model_type)
    if origin is not None:
        config = {**origin.config, "dtype": dtype}
        config.pop("torch_dtype", None)  # the name of dtype in older files
        path = origin.folder / GENERATION_JSON
        generation = read_json(path) if path.is_file() else None
        return HuggingFaceModel(origin.architecture, config, generation, files)
    try:
        architecture, keys = architecture_for(opened.config.model, options.hf_model_type)
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if opened.tokenizer is not None and opened.tokenizer.eod_or_none is not None:
        ids["eos_token_id"] = opened.tokenizer.eod
    name = _class_name(opened, architecture)
    if opened.published is not None:
        path = opened.published / CONFIG_JSON
        why = "is not that of this model"
        if not path.is_file():
            why = "is not there"
        elif options.hf_model_type is not None:
            why = f"is not that of a {options.hf_model_type} with these heads"
        opened.notes.append(f"{path} {why}: written as {name}, without its generation settings")
    config = {"architectures": [name], **keys, **ids, "dtype": dtype}
    generation = {"_from_model_config": True, **ids} if architecture.ours == "gpt" else None
    return HuggingFaceModel(architecture, config, generation, files)


def _class_name(opened: Opened, architecture: Architecture) -> str:
    """The class of transformers that has the model's heads."""
    if architecture.ours == "gpt":
        return next(iter(architecture.classes))
    if "mlm_head." in opened.absent:
        return "BertModel"
    return "BertForPreTraining" if opened.config.pair_head else "BertForMaskedLM"


def _origin(opened: Opened, wanted: str | None) -> "Published | None":
    """The published model that this is, if one of the origins has its shape and its heads. Of
    RoPE, the longest sequence may be another one."""
    from megalite.checkpoint.folder import CheckpointError
    from megalite.convert.published import read_published

    of_training = ("hidden_dropout", "attention_dropout", "init_method_std", "bert_pair")
    shape = to_flat(with_values(opened.config, asdict(opened.config.model.filled())))
    longest = shape["max_position_embeddings"]
    for folder in opened.origins:
        try:
            published = read_published(folder)
        except CheckpointError:
            continue
        if published.fields["max_position_embeddings"] != longest:
            published = published.with_positions(longest) or published
        architecture = published.architecture
        theirs = {**shape, **published.fields}
        for key in of_training:
            theirs[key] = shape[key]
        same_class = published.class_name == _class_name(opened, architecture)
        if theirs == shape and same_class and wanted in (None, architecture.model_type):
            return published
    return None


def _tokenizer_files(opened: Opened) -> dict[str, bytes]:
    """The tokenizer's files for transformers, by name. What is lacking becomes a note."""
    from megalite.data.tokenizers import TokenizerError

    if opened.tokenizer is None:
        return {}
    try:
        files = opened.tokenizer.huggingface_files()
    except TokenizerError as error:
        opened.notes.append(f"without a tokenizer: {error}")
        return {}
    if "tokenizer_config.json" not in files:
        kind = opened.config.data.tokenizer_type
        needed = f"AutoTokenizer needs a tokenizer.json, which is not made of a {kind}"
        opened.notes.append(f"{', '.join(files)}: {needed}")
    return files


DESTINATIONS: dict[str, Callable[..., None]] = {
    "megalite": to_megalite,
    "hf": to_huggingface,
    "safetensors": to_safetensors,
}
"""What writes --save, by --to."""


def sum_of_sizes(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    """Read the flags, report all problems at once (status 2), convert."""
    with failures_reported():
        convert(parse_options(Options, __doc__, check=Options.problems))
