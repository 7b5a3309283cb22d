"""The configuration of a run: the dataclasses that live beside their owners, gathered. Imports no torch.

The dataclasses are the only list of flags: names, types, choices, aliases, defaults and help are read from them. The
flat form of a configuration, {"hidden_size": 768, ...}, is what a YAML file and a checkpoint hold.
"""

import dataclasses
import difflib
import types
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from megalite.checkpoint.config import CheckpointConfig
from megalite.config.training import TrainingConfig
from megalite.data.bert_config import BertDataConfig
from megalite.data.config import DataConfig
from megalite.models.cost import HeadCost
from megalite.models.presets import preset
from megalite.nn.config import ModelConfig, RecomputeConfig
from megalite.optim.config import OptimizerConfig
from megalite.parallel.config import ParallelConfig


@dataclass(frozen=True)
class RunConfig:
    """Everything that is chosen about a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    bert: BertDataConfig = field(default_factory=BertDataConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    @property
    def is_bert(self) -> bool:
        """Whether the model is a BERT; else it is a GPT."""
        return self.model.architecture == "bert"

    @property
    def pair_head(self) -> bool:
        """Whether the model has a pooler and a head for pairs of segments."""
        return self.is_bert and self.bert.bert_pair != "none"

    @property
    def head_cost(self) -> HeadCost:
        """What the model has before and after its layers, for the cost arithmetic."""
        if not self.is_bert:
            return HeadCost()
        return HeadCost(
            predicted=self.bert.mask_prob,
            token_types=2,
            dense=True,
            pair_classes=2 if self.pair_head else 0,
        )

    @property
    def predicted(self) -> float:
        """Share of a sequence's tokens that the output layer is computed for."""
        return self.head_cost.predicted


@dataclass(frozen=True)
class Problem:
    """Something wrong with a configuration, in words for its author."""

    message: str
    """What is wrong, with the values involved."""
    fix: str
    """What would work."""
    flags: tuple[str, ...] = ()
    """Names of the fields involved."""


class ConfigError(ValueError):
    """Raised with every problem found, not only the first."""

    def __init__(self, problems: list[Problem]):
        super().__init__("; ".join(f"{p.message} (fix: {p.fix})" for p in problems))
        self.problems = problems


@dataclass(frozen=True)
class Option:
    """One field of one of the dataclasses, as a flag."""

    key: str
    """Field name, unique over all the dataclasses: tensor_model_parallel_size."""
    section: str
    """Field of RunConfig that holds it: parallel."""
    kind: type
    """bool, int, float, str, or tuple for several words of text."""
    optional: bool
    """Whether None, "unset", is a value."""
    choices: tuple[str, ...]
    """The only values of a str option; empty: any."""
    default: Any
    aliases: tuple[str, ...]
    """Short flags: ("--tp",)."""

    @property
    def flag(self) -> str:
        """The full flag: --tensor-model-parallel-size."""
        return "--" + self.key.replace("_", "-")

    @property
    def names(self) -> tuple[str, ...]:
        """What the option may be called in the flat form: its key, and its aliases without dashes."""
        return self.key, *(alias.lstrip("-").replace("-", "_") for alias in self.aliases)

    @property
    def switches(self) -> dict[str, bool]:
        """For a bool: the flags that turn it on and off. The opposite of --no-x is --x."""
        flags = (self.flag, *self.aliases)
        opposite = {
            flag: "--" + flag[5:] if flag.startswith("--no-") else "--no-" + flag[2:]
            for flag in flags
        }
        return dict.fromkeys(flags, True) | dict.fromkeys(opposite.values(), False)

    @property
    def expected(self) -> str:
        """The values it takes, in words."""
        kinds = {
            bool: "true or false",
            int: "a whole number",
            float: "a number",
            str: "text",
            tuple: "text",
        }
        words = "one of " + ", ".join(self.choices) if self.choices else kinds[self.kind]
        return words + (", or null" if self.optional else "")

    def setting(self, value: Any) -> str:
        """The command line that sets this value, with the shortest flag: `--tp 4`."""
        if self.kind is bool:
            return min((flag for flag, on in self.switches.items() if on == value), key=len)
        flag = min((self.flag, *self.aliases), key=len)
        if value is None:
            return f"leave out {flag}"
        if self.kind is tuple:
            return f"{flag} {' '.join(value)}"
        return (
            f"{flag} {value:g}"
            if isinstance(value, float) and float(f"{value:g}") == value
            else f"{flag} {value}"
        )

    def accept(self, value: Any) -> Any:
        """The value as this option's type. Raises ValueError for another type or an unknown choice.

        A float may be written as text, since YAML 1.1 reads 1e-5 as text; a tuple as one text, or as a list of texts
        and numbers.
        """
        if value is None and self.optional:
            return None
        if self.kind is tuple:
            words = (value,) if type(value) is str else value
            if (
                not isinstance(words, (list, tuple))
                or not words
                or not {type(w) for w in words} <= {str, int, float}
            ):
                raise ValueError(f"{value!r} is not {self.expected}")
            return tuple(map(str, words))
        if self.kind is float and type(value) in (int, str):
            return float(value)
        if type(value) is not self.kind or (self.choices and value not in self.choices):
            raise ValueError(f"{value!r} is not {self.expected}")
        return value

    def from_words(self, words: list[str]) -> Any:
        """The value written as these words on a command line; `unset` is None. Raises ValueError."""
        if self.optional and words == ["unset"]:
            return None
        if self.kind is tuple:
            return self.accept(words)
        return self.accept(int(words[0]) if self.kind is int else words[0])


@cache
def options() -> dict[str, Option]:
    """Every option by its key, in the order of the dataclasses."""
    found = {}
    for section in dataclasses.fields(RunConfig):
        for key, option in options_of(section.type, section.name).items():
            if key in found:
                raise TypeError(
                    f"field {key} is in two sections: {found[key].section} and {section.name}"
                )
            found[key] = option
    return found


def options_of(kind: type, section: str = "") -> dict[str, Option]:
    """The options of one dataclass by their keys."""
    hints = get_type_hints(kind, include_extras=True)
    return {
        entry.name: _option(section, entry, hints[entry.name]) for entry in dataclasses.fields(kind)
    }


def _option(section: str, entry: dataclasses.Field, hint: Any) -> Option:
    """Read an option from a dataclass field and its resolved type, such as Annotated[Literal["a", "b"] | None, ...]."""
    aliases = tuple(
        a
        for note in getattr(hint, "__metadata__", ())
        for a in getattr(note, "aliases", None) or ()
    )
    kind = hint.__origin__ if hasattr(hint, "__metadata__") else hint
    optional = get_origin(kind) in (Union, types.UnionType)
    if optional:
        (kind,) = (arm for arm in get_args(kind) if arm is not type(None))
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    kind = str if choices else get_origin(kind) or kind
    return Option(entry.name, section, kind, optional, choices, entry.default, aliases)


def to_flat(config: RunConfig) -> dict[str, Any]:
    """Every field by its name, in the order of the dataclasses."""
    return {o.key: getattr(getattr(config, o.section), o.key) for o in options().values()}


def from_flat(flat: dict[str, Any], base: RunConfig | None = None) -> RunConfig:
    """The configuration `base` (the defaults, unless given) with the values of `flat`. Keys may be spelt with hyphens,
    and short (tp). Raises ConfigError with every unknown or repeated key and every value of a wrong type."""
    values, problems = read_flat(flat)
    if problems:
        raise ConfigError(problems)
    return with_values(base or RunConfig(), with_preset(values))


def with_preset(values: dict[str, Any]) -> dict[str, Any]:
    """The values by key, and those of the preset among them that they do not name themselves. Raises ConfigError when
    the preset is of another architecture than they say."""
    name = values.get("preset")
    shape = preset(name) if name else {}
    if shape and values.get("architecture", shape["architecture"]) != shape["architecture"]:
        asked = values["architecture"]
        message = f"--preset {name} is the shape of a {shape['architecture'].upper()}, but --architecture is {asked}"
        fix = f"leave out --preset, or --architecture {shape['architecture']}"
        raise ConfigError([Problem(message, fix, ("preset", "architecture"))])
    return shape | values


def read_flat(flat: dict[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """(values by key, problems): what `from_flat` does up to the point where it raises."""
    by_name = {name: option for option in options().values() for name in option.names}
    values, problems, spelt = {}, [], {}
    for name, value in flat.items():
        option = by_name.get(str(name).replace("-", "_"))
        if option is None:
            match = nearest(str(name).replace("-", "_"), by_name)
            problems.append(
                Problem(f"unknown key {name!r}", f"write {match}" if match else "remove it")
            )
        elif option.key in values:
            problems.append(
                Problem(
                    f"{spelt[option.key]!r} and {name!r} are the same",
                    "keep one of them",
                    (option.key,),
                )
            )
        else:
            try:
                values[option.key], spelt[option.key] = option.accept(value), name
            except ValueError:
                shown = f"{name}: {value!r} is not {option.expected}"
                problems.append(
                    Problem(shown, f"for example {name}: {example(option)}", (option.key,))
                )
    return values, problems


def with_values(config: RunConfig, values: dict[str, Any]) -> RunConfig:
    """The configuration with these fields replaced; no checks."""
    sections = {}
    for key, value in values.items():
        sections.setdefault(options()[key].section, {})[key] = value
    replaced = {
        name: dataclasses.replace(getattr(config, name), **part) for name, part in sections.items()
    }
    return dataclasses.replace(config, **replaced)


def to_yaml(config: RunConfig) -> str:
    """The whole configuration as a YAML file that --config reads back to the same values."""
    import yaml

    flat = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in to_flat(config).items()
    }
    return yaml.safe_dump(flat, sort_keys=False)


def nearest(name: str, names) -> str | None:
    """The most similar of `names`, or None when none is similar."""
    return next(iter(difflib.get_close_matches(name, names, 1)), None)


def example(option: Option) -> str:
    """A value that the option takes: its default where it has one."""
    if option.default is not None and option.default is not dataclasses.MISSING:
        return str(option.default).lower() if option.kind is bool else str(option.default)
    return (
        option.choices[0]
        if option.choices
        else {int: "1", float: "1.0", str: "NAME", tuple: "NAME"}[option.kind]
    )
