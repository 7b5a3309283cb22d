"""How each parameter is updated, as the flags say. Imports no torch."""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache

from megalite.optim.config import OptimizerConfig

FREEZE = {"freeze": True, "train": False}
NUMBERS = ("lr_factor", "weight_decay")
SETTINGS = "lr_factor=NUMBER, weight_decay=NUMBER, freeze or train"
DECOUPLED = ("embedding.word_embeddings.weight", "output.weight")
"""Parameters that --decoupled-lr is for: the rows of the vocabulary."""


@dataclass(frozen=True)
class ParameterGroup:
    """What --parameter-groups says of the parameters whose names match a pattern. None: nothing."""

    pattern: str
    """Of global names: `*` any text, `?` any character, `[0-3]` one of these."""
    lr_factor: float | None = None
    """Factor of the learning rate."""
    weight_decay: float | None = None
    """Weight decay, in place of --weight-decay and for biases and norms too."""
    frozen: bool | None = None
    """Whether they keep their values."""

    def matches(self, name: str) -> bool:
        """Whether the parameter of this name is meant."""
        return fnmatchcase(name, self.pattern)


@cache
def parse_group(text: str) -> ParameterGroup:
    """Read `PATTERN SETTING ...`, as in `embedding.* lr_factor=0.1 weight_decay=0`.

    Raises ValueError that says what is wrong.
    """
    pattern, *words = text.split() or [""]
    if not words:
        raise ValueError(f"needs a pattern and one or more of {SETTINGS}")
    values: dict[str, float | bool] = {}
    for word in words:
        name, equals, number = word.partition("=")
        if word in FREEZE:
            key = "frozen"
            value = FREEZE[word]
        elif name in NUMBERS and equals:
            key = name
            value = _number(word, number)
        else:
            raise ValueError(f"{word!r} is none of {SETTINGS}")
        if key in values:
            raise ValueError(f"{word!r} is the second setting of its kind")
        values[key] = value
    if values.get("frozen") and len(values) > 1:
        raise ValueError("what is frozen has no learning rate and no weight decay")
    return ParameterGroup(pattern, **values)


def _number(word: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise ValueError(f"{word!r}: a number of at least 0 is needed")
    return value


@dataclass(frozen=True)
class Treatment:
    """How a parameter is updated. Parameters of equal treatment are one parameter group of
    torch's."""

    rule: str
    """Its update rule: a key of UPDATE_RULES."""
    decays: bool
    """Whether it has the weight decay of --weight-decay."""
    is_decoupled: bool = False
    """Whether it has the learning rate of --decoupled-lr."""
    lr_factor: float = 1.0
    """Factor of its learning rate."""
    weight_decay: float | None = None
    """Weight decay of its own."""
    frozen: bool = False
    """Whether it keeps its value: it has no gradient, and the optimizer keeps nothing of it."""


def treatment_of(name: str, decays: bool, config: OptimizerConfig) -> Treatment:
    """The treatment of one parameter.

    Args:
        name: global name.
        decays: False for biases and norms: all else is a matrix, or several.
        config: the flags.
    """
    rule = config.optimizer
    if rule == "muon" and not (decays and name.startswith("layers.")):
        rule = "adam"
    is_decoupled = config.decoupled_lr is not None and name in DECOUPLED
    settings = {}
    # Of several groups with the same setting, the last one counts.
    for group in map(parse_group, config.parameter_groups or ()):
        if group.matches(name):
            for key in (*NUMBERS, "frozen"):
                if getattr(group, key) is not None:
                    settings[key] = getattr(group, key)
    if settings.get("frozen"):
        return Treatment(rule, decays, frozen=True)
    return Treatment(rule, decays, is_decoupled, **settings)
