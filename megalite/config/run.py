"""The configuration of a run: the dataclasses that stand beside their owners. Imports no torch.

The flat form of a configuration, {"hidden_size": 768, ...}, is what a YAML file and a checkpoint
hold.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from megalite.checkpoint.config import CheckpointConfig
from megalite.checkpoint.folder import CheckpointError, has_checkpoint
from megalite.config.options import DECIMAL, Option, nearest, options_of
from megalite.config.problem import ConfigError, Problem
from megalite.config.training import TrainingConfig
from megalite.convert.formats import FORMATS, formats_in
from megalite.convert.published import CONFIG_JSON, ONE_FILE, Published, read_folder, read_published
from megalite.convert.tokenizer_files import tokenizer_of
from megalite.data.batch_sizes import START, BatchSizes, Point
from megalite.data.bert_config import BertDataConfig
from megalite.data.config import DataConfig
from megalite.deepspeed.config import DeepSpeedConfig
from megalite.fields import Field
from megalite.models.cost import HeadCost
from megalite.models.presets import preset
from megalite.nn.config import ModelConfig, RecomputeConfig
from megalite.optim.config import OptimizerConfig
from megalite.optim.schedule import Schedule
from megalite.parallel.config import ParallelConfig
from megalite.pipeline.partition import layers_of_stages
from megalite.pipeline.schedules import Pipeline, pipeline_of


@dataclass(frozen=True)
class RunConfig:
    """Everything that is chosen about a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    data: DataConfig = field(default_factory=DataConfig)
    bert: BertDataConfig = field(default_factory=BertDataConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    @property
    def head_cost(self) -> HeadCost:
        """What the model has before and after its layers, for the cost arithmetic."""
        return HEAD_OF[self.model.architecture](self.bert)

    @property
    def pair_head(self) -> bool:
        """Whether the model has a pooler and a head for pairs of segments."""
        return self.head_cost.pair_classes > 0

    @property
    def predicted(self) -> float:
        """Share of a sequence's tokens that the output layer is computed for."""
        return self.head_cost.predicted

    @property
    def given_chunks(self) -> int | None:
        """Stages on a pipeline rank, as either of the two flags says; None when neither does."""
        p = self.parallel
        layers = p.num_layers_per_virtual_pipeline_stage
        if p.num_virtual_stages_per_pipeline_rank is not None or layers is None:
            return p.num_virtual_stages_per_pipeline_rank
        return max(1, self.divided_layers // (layers * p.pipeline_model_parallel_size))

    @property
    def divided_layers(self) -> int:
        """What is divided into pipeline stages: the layers, and the embedding and the loss where
        flags count them as one each."""
        p = self.parallel
        counted = (p.account_for_embedding_in_pipeline_split, p.account_for_loss_in_pipeline_split)
        return self.model.num_layers + sum(counted)

    @property
    def pipeline(self) -> Pipeline:
        """The stages of each pipeline rank: one where --pipeline-schedule auto is still to
        choose."""
        given = replace(self.parallel, num_virtual_stages_per_pipeline_rank=self.given_chunks)
        return pipeline_of(given)

    @property
    def layers_of_stages(self) -> list[range]:
        """The layers of each pipeline stage, once the size of the vocabulary is known. Raises
        ValueError when they cannot be divided as the flags say."""
        return layers_of_stages(
            self.model, self.parallel, self.pipeline, recompute=self.recompute, head=self.head_cost
        )

    @property
    def batch_sizes(self) -> BatchSizes:
        """Sizes of the global batches of a resolved configuration."""
        return BatchSizes.from_words(self.data.global_batch_size, self.data.rampup_batch_size)

    def iterations_of_samples(self, sizes: BatchSizes, since: Point = START) -> int | None:
        """Iterations at the end of --train-samples or --train-tokens in batches of these sizes;
        None when neither is given. since: iterations and samples that were done before."""
        t = self.training
        if t.train_samples is not None:
            return sizes.iterations_within(t.train_samples, since)
        if t.train_tokens is not None:
            samples = -(-t.train_tokens // self.model.seq_length)
            return sizes.iterations_within(samples - 1, since) + 1
        return None

    def schedule(self, since: Point = START) -> Schedule:
        """Schedules of learning rate and weight decay of a resolved configuration. since:
        iterations and samples that were done before, maybe in batches of other sizes."""
        iterations = self.training.train_iters
        samples = self.batch_sizes.consumed_after(iterations, since)
        return Schedule.of_run(self.optimizer, iterations=iterations, samples=samples)


def _gpt_head(bert: BertDataConfig) -> HeadCost:
    return HeadCost()


def _bert_head(bert: BertDataConfig) -> HeadCost:
    classes = 0 if bert.bert_pair == "none" else 2
    return HeadCost(predicted=bert.mask_prob, token_types=2, dense=True, pair_classes=classes)


HEAD_OF = {"gpt": _gpt_head, "bert": _bert_head}
"""What a model has before and after its layers, by architecture."""


@cache
def options() -> dict[str, Option]:
    """Every option of a run by its key, in the order of the dataclasses."""
    found = {}
    for section in dataclasses.fields(RunConfig):
        for key, option in options_of(section.type, section.name).items():
            if key in found:
                first = found[key].section
                raise TypeError(f"field {key} is in two sections: {first} and {section.name}")
            found[key] = option
    return found


def keys_where(fact: Callable[[Field], Any]) -> tuple[str, ...]:
    """Keys of the fields whose annotation has a fact: `keys_where(lambda f: f.needs_eod)`."""
    return tuple(key for key, option in options().items() if fact(option.field))


def to_flat(config: RunConfig) -> dict[str, Any]:
    """Every field by its name, in the order of the dataclasses."""
    return {o.key: getattr(getattr(config, o.section), o.key) for o in options().values()}


def from_flat(flat: dict[str, Any], base: RunConfig | None = None) -> RunConfig:
    """The configuration `base` (the defaults, unless given) with the values of `flat`.

    Keys may be spelt with hyphens, and short (tp). Raises ConfigError with every unknown or
    repeated key and every value of a wrong type.
    """
    values, problems = read_flat(flat)
    if problems:
        raise ConfigError(problems)
    return with_values(base or RunConfig(), with_preset(with_published(values)))


def read_flat(
    flat: dict[str, Any], written: dict[str, str] | None = None
) -> tuple[dict[str, Any], list[Problem]]:
    """(values by key, problems): what `from_flat` does up to the point where it raises.

    written: how each value looks in its file, by name, for the messages.
    """
    by_name = {}
    for option in options().values():
        for flag in option.flags:
            by_name[flag.removeprefix("--").replace("-", "_")] = option
    values = {}
    problems = []
    spelt = {}
    for name, value in flat.items():
        normal = str(name).replace("-", "_")
        option = by_name.get(normal)
        if option is None:
            match = nearest(normal, by_name)
            fix = f"write {match}" if match else "remove it"
            problems.append(Problem(f"unknown key {name!r}", fix))
            continue
        if option.key in values:
            message = f"{spelt[option.key]!r} and {name!r} are the same"
            problems.append(Problem(message, "keep one of them", (option.key,)))
            continue
        try:
            values[option.key] = option.accept(value)
            spelt[option.key] = name
        except ValueError:
            shown = repr(value) if written is None else written[name]
            message = f"{name}: {shown} is not {option.expected}"
            fix = f"for example {name}: {option.example_in_yaml}"
            if option.kind in (int, float) and isinstance(value, str):
                quoted = DECIMAL.fullmatch(value) and shown[:1] in "\"'"
                fix = f"{name}: {value}, without quotes" if quoted else "decimal digits, " + fix
            elif option.kind is str and not option.choices and isinstance(value, (int, float)):
                fix += f", or quote it: {name}: '...'"
            problems.append(Problem(message, fix, (option.key,)))
    return values, problems


def with_preset(values: dict[str, Any]) -> dict[str, Any]:
    """The values by key, and those of the preset among them that they do not name themselves.

    Raises ConfigError when the preset is of another architecture than they say.
    """
    name = values.get("preset")
    if name is None:
        return values
    shape = preset(name)
    architecture = shape["architecture"]
    asked = values.get("architecture", architecture)
    if asked != architecture:
        shown = f"--preset {name} is the shape of a {architecture.upper()}"
        message = f"{shown}, but --architecture is {asked}"
        fix = f"leave out --preset, or --architecture {architecture}"
        raise ConfigError([Problem(message, fix, ("preset", "architecture"))])
    return shape | values


OTHER_FORMATS = {
    "megalite": "--pretrained-checkpoint {} --use-checkpoint-args",
    "megatron": "tools/convert_checkpoint.py --from megatron --to megalite --load {} --save NEW, "
    "then --pretrained-checkpoint NEW --use-checkpoint-args",
}
"""How to start from weights that --load-hf does not read, by their format."""


def with_published(values: dict[str, Any]) -> dict[str, Any]:
    """The values by key, and those that the folder of --load-hf gives: the shape of its model, its
    dropout, and its tokenizer where the values name none.

    Raises ConfigError with everything in the folder that megalite does not know, or with every
    value that contradicts it.
    """
    filled, problems = fill_published(values)
    if problems:
        raise ConfigError(problems)
    return filled


def fill_published(values: dict[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """(`with_published`, with the folder's values in place of those that contradict it; the
    problems of these). Raises ConfigError when the folder's model is not known."""
    folder = values.get("load_hf")
    if not folder:
        return values, []
    _check_folder(Path(folder))
    try:
        published = read_published(folder)
    except CheckpointError as error:
        raise ConfigError(published_problems(_all_that_is_wrong(error, values))) from None
    problems = contradictions(values, published)
    wrong = {key for problem in problems for key in problem.keys}
    filled = shape_of(published)
    if values.get("tokenizer_type") is None and not values.get("mock_data"):
        filled |= tokenizer_of(published.folder)
    for key, value in values.items():
        if value is not None and key not in wrong:
            filled[key] = value
    if values.get("seq_length") is None:
        filled["seq_length"] = min(filled["seq_length"], filled["max_position_embeddings"])
    return filled, problems


def _check_folder(folder: Path) -> None:
    """Raise ConfigError where --load-hf is no folder, or one of another format."""
    there = formats_in(folder)
    given = f"--load-hf {folder}"
    if not folder.exists():
        message = f"{given}: there is no such folder; nothing is downloaded"
        fix = f"--load-hf FOLDER with {CONFIG_JSON} and {ONE_FILE}"
    elif not folder.is_dir():
        message = f"{given} is a file"
        fix = f"--load-hf {folder.parent}"
    elif there and "hf" not in there:
        message = f"{given} holds {FORMATS[there[0]]}, and no model of Hugging Face"
        fix = OTHER_FORMATS[there[0]].format(folder)
    else:
        return
    raise ConfigError([Problem(message, fix, ("load_hf",))])


def shape_of(published: Published) -> dict[str, Any]:
    """The fields that a model of --load-hf gives, by key."""
    longest = published.fields["max_position_embeddings"]
    return {**published.fields, "seq_length": min(ModelConfig.seq_length, longest)}


def contradictions(values: dict[str, Any], published: Published) -> list[Problem]:
    """The values, by key, that cannot stand beside the model of --load-hf."""
    folder = published.folder
    problems = []
    if values.get("preset"):
        message = f"--load-hf {folder} and --preset {values['preset']} both say what the model is"
        problems.append(Problem(message, "leave out --preset", ("preset",)))
    for key, there in published.fields.items():
        here = values.get(key)
        if here is not None and not _agrees(key, here, published):
            option = options()[key]
            message = f"{option.setting(here)}, but the model in {folder} has {key} {there}"
            problems.append(Problem(message, f"leave out {option.flag}", (key,)))
    return problems


def _agrees(key: str, here: Any, published: Published) -> bool:
    """Whether a value may stand beside the model of --load-hf."""
    there = published.fields[key]
    if key == "bert_pair":
        return (here == "none") == (there == "none")
    if key == "max_position_embeddings" and here != there:
        return published.with_positions(here) is not None
    same_model = key == "architecture" or options()[key].field.defines_model
    return here == there or not same_model


def _all_that_is_wrong(error: CheckpointError, values: dict[str, Any]) -> CheckpointError:
    """The error of a config.json, with what is wrong with the weights beside it, unless the run
    resumes a checkpoint and does not read them."""
    if values.get("load") and has_checkpoint(values["load"]):
        return error
    try:
        read_folder(values["load_hf"])
    except CheckpointError as whole:
        return whole
    return error


def published_problems(error: CheckpointError) -> list[Problem]:
    """What is wrong with the folder of --load-hf."""
    fix = f"--load-hf FOLDER with {CONFIG_JSON} and {ONE_FILE} of a model that megalite knows"
    where = getattr(error, "where", None)
    reasons = [f"{where}: {text}" for text in error.problems] if where else [str(error)]
    return [Problem(f"--load-hf: {reason}", fix, ("load_hf",)) for reason in reasons]


def with_values(config: RunConfig, values: dict[str, Any]) -> RunConfig:
    """The configuration with these fields replaced; no checks."""
    by_section = {}
    for key, value in values.items():
        by_section.setdefault(options()[key].section, {})[key] = value
    sections = {}
    for name, changes in by_section.items():
        sections[name] = dataclasses.replace(getattr(config, name), **changes)
    return dataclasses.replace(config, **sections)
