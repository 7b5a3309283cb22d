"""How keys of a config.json are fields of ModelConfig. Imports no torch.

Each class here is one or a few keys, read and written by the same object. What it cannot express is
a problem, in words.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol, get_type_hints

from megalite.fields import Field
from megalite.nn.config import ModelConfig

Values = dict[str, Any]


@dataclass
class Findings:
    """What was found in a translation."""

    problems: list[str] = field(default_factory=list)
    """What cannot be translated, each with what would work."""
    notes: list[str] = field(default_factory=list)
    """What a person should know."""
    shapes_known: bool = True
    """Whether everything that the shapes of tensors depend on was translated."""


class Keys(Protocol):
    """Some keys of a config.json and the fields that they are."""

    names: tuple[str, ...]
    """The keys."""
    fields: tuple[str, ...]
    """The fields of ModelConfig."""

    def read(self, config: Mapping[str, Any], found: Findings) -> Values:
        """Fields from a config.json."""

    def write(self, model: Mapping[str, Any], found: Findings) -> Values:
        """Keys of config.json from the filled fields of a model."""


MOST = 2**31
"""Largest number that is read, of heads, rows and so on: a file that gives a larger one is damaged,
or made to do damage."""
MOST_LAYERS = 10_000
"""Of layers."""


@cache
def bounds_of(field: str) -> Field:
    """What is known about a field of ModelConfig: the bounds of its numbers."""
    kind = get_type_hints(ModelConfig, include_extras=True)[field]
    return next(part for part in kind.__metadata__ if isinstance(part, Field))


def number_problem(name: str, value: Any, field: str) -> str | None:
    """Why a key's value is no number that training takes as this field."""
    bounds = bounds_of(field)
    sound = type(value) in (int, float)
    if sound:
        try:
            sound = bounds.contains(value)
        except OverflowError:  # a whole number that no float can be
            sound = False
    return None if sound else f"{name} is {value!r:.40}; it must be a number {bounds.bounds}"


MISSING = object()
"""A default of a key that a file must have."""


@dataclass(frozen=True)
class Value:
    """One key that is one field."""

    name: str
    field: str
    default: Any = MISSING
    """What a missing key means, or a function of the config.json that computes it."""
    choices: Mapping[Any, Any] | None = None
    """Their value -> ours. The first of several with the same meaning is written."""
    kind: type | tuple[type, ...] = int
    """Of their value, without choices."""

    @property
    def names(self) -> tuple[str, ...]:
        """The key."""
        return (self.name,)

    @property
    def fields(self) -> tuple[str, ...]:
        """The field."""
        return (self.field,)

    def read(self, config: Mapping[str, Any], found: Findings) -> Values:
        """The field."""
        value = config.get(self.name)
        if value is None:
            value = self.default
            if callable(value):
                value = value(config)
        if value is MISSING:
            found.problems.append(f"{self.name} is missing")
            return {}
        if self.choices is not None:
            if type(value) not in (str, bool) or value not in self.choices:
                known = ", ".join(map(repr, self.choices))
                found.problems.append(f"{self.name} is {value!r}; megalite knows {known}")
                return {}
            return {self.field: self.choices[value]}
        if self.kind is float:
            problem = number_problem(self.name, value, self.field)
            if problem:
                found.problems.append(problem)
                return {}
        elif type(value) is not self.kind or value <= 0:
            wanted = "a positive whole number"
            found.problems.append(f"{self.name} is {value!r}; it must be {wanted}")
            return {}
        most = MOST_LAYERS if self.field == "num_layers" else MOST
        if value > most:
            found.problems.append(f"{self.name} is {value!r:.40}; megalite reads up to {most:,}")
            return {}
        return {self.field: self.kind(value)}

    def write(self, model: Mapping[str, Any], found: Findings) -> Values:
        """The key."""
        value = model[self.field]
        if self.choices is None:
            return {self.name: value}
        for theirs, ours in self.choices.items():
            if ours == value:
                return {self.name: theirs}
        possible = ", ".join(map(str, dict.fromkeys(self.choices.values())))
        found.problems.append(f"{self.field} is {value}; possible: {possible}")
        return {}


@dataclass(frozen=True)
class Only:
    """A key of which megalite knows one value, or a few that mean the same."""

    name: str
    allowed: tuple[Any, ...]
    """The first is written, unless it is None."""
    why: str = ""

    fields: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The key."""
        return (self.name,)

    def read(self, config: Mapping[str, Any], found: Findings) -> Values:
        """Nothing, or a problem."""
        value = config.get(self.name, self.allowed[0])
        kinds = set(map(type, self.allowed))
        if value not in self.allowed or type(value) not in kinds:  # 1 == True
            known = " or ".join(map(repr, self.allowed))
            why = self.why and f" ({self.why})"
            found.problems.append(f"{self.name} is {value!r}; megalite knows {known} only{why}")
        return {}

    def write(self, model: Mapping[str, Any], found: Findings) -> Values:
        """The key."""
        return {} if self.allowed[0] is None else {self.name: self.allowed[0]}


@dataclass(frozen=True)
class Always:
    """Fields that every model of an architecture has alike, without a key."""

    values: Mapping[str, Any]
    names: tuple[str, ...] = ()

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields."""
        return tuple(self.values)

    def read(self, config: Mapping[str, Any], found: Findings) -> Values:
        """The fields."""
        return dict(self.values)

    def write(self, model: Mapping[str, Any], found: Findings) -> Values:
        """No key, or a problem."""
        for name, value in self.values.items():
            if model[name] != value:
                found.problems.append(f"{name} is {model[name]}; it must be {value}")
        return {}


class Usual(Always):
    """Fields without a key that change nothing in a trained model: those of another kind of MLP,
    and a dropout that transformers does not know."""

    def write(self, model: Mapping[str, Any], found: Findings) -> Values:
        """Nothing."""
        return {}


@dataclass(frozen=True)
class Heads:
    """Heads that are those of plain multi-head attention: each with h/n components, a key and a
    value for every query."""

    names: tuple[str, ...] = ()
    fields: tuple[str, ...] = ("kv_channels", "num_query_groups")

    def read(self, config: Mapping[str, Any], found: Findings) -> Values:
        """Nothing: the defaults."""
        return {}

    def write(self, model: Mapping[str, Any], found: Findings) -> Values:
        """No key, or a problem."""
        heads = model["num_attention_heads"]
        if model["num_query_groups"] != heads:
            found.problems.append(f"num_query_groups is {model['num_query_groups']}, not {heads}")
        if model["kv_channels"] * heads != model["hidden_size"]:
            found.problems.append(f"kv_channels is {model['kv_channels']}, not hidden_size / heads")
        return {}


@dataclass(frozen=True)
class Dropouts:
    """Keys of the probability of dropping a hidden element: all alike."""

    names: tuple[str, ...]
    default: float = 0.1
    fields: tuple[str, ...] = ("hidden_dropout",)

    def read(self, config: Mapping[str, Any], found: Findings) -> Values:
        """--hidden-dropout."""
        values = {name: config.get(name, self.default) for name in self.names}
        problems = []
        for name, value in values.items():
            problems.append(number_problem(name, value, "hidden_dropout"))
        if any(problems):
            found.problems += filter(None, problems)
            return {}
        if len(set(values.values())) > 1:
            shown = " and ".join(f"{name} {value}" for name, value in values.items())
            fix = "megalite has one probability for both; make them equal in config.json"
            found.problems.append(f"{shown} differ: {fix}")
            return {}
        return {"hidden_dropout": float(values[self.names[0]])}

    def write(self, model: Mapping[str, Any], found: Findings) -> Values:
        """The keys."""
        return dict.fromkeys(self.names, model["hidden_dropout"])


@dataclass(frozen=True)
class Biases:
    """attention_bias and mlp_bias: biases of all linear layers, or of none."""

    names: tuple[str, ...] = ("attention_bias", "mlp_bias")
    fields: tuple[str, ...] = ("disable_bias_linear", "add_qkv_bias")

    def read(self, config: Mapping[str, Any], found: Findings) -> Values:
        """--disable-bias-linear."""
        values = [config.get(name) or False for name in self.names]
        if values[0] not in (True, False) or values.count(values[0]) != len(values):
            shown = " and ".join(f"{name} {value!r}" for name, value in zip(self.names, values))
            both = "megalite has biases in all linear layers, or in none"
            found.problems.append(f"{shown}: {both}, or in queries, keys and values alone (qwen2)")
            return {}
        if values[0] and len(self.names) == 1:
            alone = "biases in attention and none in the MLP are not supported"
            found.problems.append(f"{self.names[0]} is True: {alone}")
            return {}
        return {"disable_bias_linear": not values[0], "add_qkv_bias": False}

    def write(self, model: Mapping[str, Any], found: Findings) -> Values:
        """The keys."""
        bias = not model["disable_bias_linear"]
        if model["add_qkv_bias"] and not bias:
            found.problems.append("biases of queries, keys and values alone are for qwen2")
        if bias and len(self.names) == 1:
            found.problems.append("biases in linear layers have no key")
        return dict.fromkeys(self.names, bias)


ROPE_FIELDS = {
    "factor": "rope_scaling_factor",
    "low_freq_factor": "rope_low_freq_factor",
    "high_freq_factor": "rope_high_freq_factor",
    "original_max_position_embeddings": "rope_original_max_position_embeddings",
}
"""Keys of the scaling `llama3`, and our fields."""


@dataclass(frozen=True)
class Rope:
    """rope_parameters of transformers 5, or rope_theta and rope_scaling of version 4."""

    theta: float = 10000.0
    """Base when a file gives none."""
    names: tuple[str, ...] = (
        "rope_parameters",
        "rope_theta",
        "rope_scaling",
        "partial_rotary_factor",
    )
    fields: tuple[str, ...] = (
        "position_embedding_type",
        "rotary_base",
        "rope_scaling",
        *ROPE_FIELDS.values(),
    )

    def read(self, config: Mapping[str, Any], found: Findings) -> Values:
        """Base and scaling of the frequencies."""
        given = config.get("rope_parameters") or {}
        old = config.get("rope_scaling") or {}
        if not isinstance(given, dict) or not isinstance(old, dict):
            found.problems.append("rope_parameters and rope_scaling must be objects")
            return {}
        merged = {"rope_theta": config.get("rope_theta", self.theta), **old, **given}
        for name, value in given.items():
            other = {"rope_theta": config.get("rope_theta"), **old}.get(name)
            if other not in (None, value):
                found.problems.append(f"rope_parameters has {name} {value}, another key {other}")
        kind = merged.pop("rope_type", merged.pop("type", "default"))
        merged.pop("type", None)
        share = merged.pop("partial_rotary_factor", config.get("partial_rotary_factor"))
        if share not in (None, 1, 1.0):
            found.problems.append(
                f"partial_rotary_factor is {share}; megalite rotates whole heads only"
            )
        base = merged.pop("rope_theta")
        problem = number_problem("rope_theta", base, "rotary_base")
        if problem:
            found.problems.append(problem)
            return {}
        values = {"position_embedding_type": "rope", "rotary_base": float(base)}
        if kind == "default":
            self._refuse_unknown(merged, (), found)
            return values | {"rope_scaling": "none"}
        if kind != "llama3":
            found.problems.append(f"rope_type is {kind!r}; megalite knows 'default' and 'llama3'")
            return {}
        self._refuse_unknown(merged, tuple(ROPE_FIELDS), found)
        return values | {"rope_scaling": "llama3"} | self._llama3(merged, found)

    @staticmethod
    def _llama3(merged: Values, found: Findings) -> Values:
        """The numbers of the scaling `llama3`."""
        values = {}
        for name, ours in ROPE_FIELDS.items():
            number = merged.get(name)
            if number is None:
                found.problems.append(f"rope scaling llama3 needs {name}; it is {number!r}")
                continue
            problem = number_problem(name, number, ours)
            whole = name.startswith("original")
            if problem is None and whole and number != int(number):
                problem = f"{name} is {number!r}; it must be a whole number"
            if problem:
                found.problems.append(f"rope scaling llama3: {problem}")
                continue
            values[ours] = int(number) if whole else float(number)
        low = values.get("rope_low_freq_factor")
        high = values.get("rope_high_freq_factor")
        if None not in (low, high) and high <= low:
            found.problems.append(
                f"rope scaling llama3: high_freq_factor is {high}; it must be above "
                f"low_freq_factor, {low}"
            )
        return values

    @staticmethod
    def _refuse_unknown(merged: Values, known: tuple[str, ...], found: Findings) -> None:
        for name in merged:
            if name not in known:
                found.problems.append(f"rope_parameters has {name}, which megalite does not know")

    def write(self, model: Mapping[str, Any], found: Findings) -> Values:
        """Both spellings: version 4 of transformers does not know the newer one."""
        if model["position_embedding_type"] != "rope":
            kind = model["position_embedding_type"]
            found.problems.append(f"position_embedding_type is {kind}; it must be rope")
            return {}
        scaling = {"rope_type": "default"}
        if model["rope_scaling"] == "llama3":
            scaling = {name: model[ours] for name, ours in ROPE_FIELDS.items()}
            scaling["rope_type"] = "llama3"
        base = model["rotary_base"]
        keys = {"rope_theta": base, "rope_parameters": {**scaling, "rope_theta": base}}
        keys["rope_scaling"] = scaling if model["rope_scaling"] == "llama3" else None
        return keys


@dataclass(frozen=True)
class Positions:
    """max_position_embeddings, and a sliding window: within it both kinds of attention are equal,
    so it limits the positions."""

    window_default: int | None = None
    """What a missing sliding_window means."""
    switch: bool = False
    """Whether use_sliding_window turns the window on."""
    default: int = 2048
    fields: tuple[str, ...] = ("max_position_embeddings",)

    @property
    def names(self) -> tuple[str, ...]:
        """The keys."""
        window = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")
        return ("max_position_embeddings", *window)

    def read(self, config: Mapping[str, Any], found: Findings) -> Values:
        """The longest sequence."""
        longest = config.get("max_position_embeddings", self.default)
        if type(longest) is not int or longest < 1:
            found.problems.append(f"max_position_embeddings is {longest!r}")
            return {}
        kinds = config.get("layer_types")
        kinds = ["full_attention"] if kinds is None else kinds
        if not isinstance(kinds, list):
            found.problems.append(f"layer_types is {kinds!r:.40}; it must be a list of texts")
            return {}
        unknown = set(map(str, kinds)) - {"full_attention", "sliding_attention"}
        if unknown:
            found.problems.append(f"layer_types has {', '.join(sorted(unknown))}")
        window = config.get("sliding_window", self.window_default)
        on = bool(config.get("use_sliding_window")) if self.switch else window is not None
        if not on and "sliding_attention" not in kinds:
            return {"max_position_embeddings": longest}
        if type(window) is not int or window < 1:
            found.problems.append(f"sliding_window is {window!r}")
            return {}
        if window < longest:
            found.notes.append(
                f"max_position_embeddings is the sliding window, {window}, in place of {longest}: "
                "attention without a window is the same within it"
            )
        return {"max_position_embeddings": min(longest, window)}

    def write(self, model: Mapping[str, Any], found: Findings) -> Values:
        """The longest sequence, without a window."""
        keys = {"max_position_embeddings": model["max_position_embeddings"]}
        if self.window_default is not None or self.switch:
            keys["sliding_window"] = None
        if self.switch:
            keys["use_sliding_window"] = False
        return keys
