"""The fields of configuration dataclasses as options: flag, type, choices, facts. Imports no torch.

The dataclasses are the only list of flags. Names, types, choices, defaults and the `Field` of the
annotation are read from them here.
"""

import dataclasses
import difflib
import re
import types
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from megalite.fields import Field

DECIMAL = re.compile(r"[-+]?((0|[1-9]\d*)(\.\d*)?|\.\d+)([eE][-+]?\d+)?", re.ASCII)
"""A number written in decimal digits, without leading zeros."""


@dataclass(frozen=True)
class Option:
    """One field of a dataclass, as a flag."""

    key: str
    """Field name, unique over the dataclasses of a program: tensor_model_parallel_size."""
    section: str
    """Field of RunConfig that holds the dataclass: parallel."""
    kind: type
    """bool, int, float, str, or tuple for several words of text."""
    optional: bool
    """Whether None, "unset", is a value."""
    choices: tuple[str, ...]
    """The only values of a str option; empty: any."""
    default: Any
    """dataclasses.MISSING where the option is required."""
    field: Field
    """What its annotation says."""

    @property
    def flag(self) -> str:
        """The full flag: --tensor-model-parallel-size."""
        return "--" + self.key.replace("_", "-")

    @property
    def flags(self) -> tuple[str, ...]:
        """The full flag and its aliases."""
        return self.flag, *self.field.aliases

    @property
    def shortest(self) -> str:
        """The shortest flag: --tp."""
        return min(self.flags, key=len)

    @property
    def names(self) -> tuple[str, ...]:
        """What the option may be called in the flat form: its flags without dashes, tp."""
        return tuple(flag.lstrip("-").replace("-", "_") for flag in self.flags)

    @property
    def switches(self) -> dict[str, bool]:
        """For a bool: the flags that turn it on and off. The opposite of --no-x is --x."""
        found = {}
        for flag in self.flags:
            opposite = "--" + flag[5:] if flag.startswith("--no-") else "--no-" + flag[2:]
            found |= {flag: True, opposite: False}
        return found

    @property
    def expected(self) -> str:
        """The values it takes, in words."""
        kinds = {bool: "true or false", int: "a whole number", float: "a number"}
        words = kinds.get(self.kind, "text")
        if self.choices:
            words = "one of " + ", ".join(self.choices)
        return words + (", or null" if self.optional else "")

    @property
    def example(self) -> str:
        """A value that the option takes, as text: its default where it has one."""
        usual = self.usual
        if usual is not None:
            return str(usual).lower() if self.kind is bool else str(usual)
        if self.choices:
            return self.choices[0]
        return {int: "1", float: "1.0"}.get(self.kind, "NAME")

    @property
    def usual(self) -> Any:
        """The default, or the example of the annotation, or None."""
        has_default = self.default is not None and self.default is not dataclasses.MISSING
        return self.default if has_default else self.field.example

    def setting(self, value: Any) -> str:
        """The command line that sets this value, with the shortest flag: `--tp 4`."""
        if self.kind is bool:
            return min((flag for flag, on in self.switches.items() if on == value), key=len)
        if value is None:
            return f"leave out {self.shortest}"
        if self.kind is tuple:
            return f"{self.shortest} {' '.join(value)}"
        if isinstance(value, float) and float(f"{value:g}") == value:
            return f"{self.shortest} {value:g}"
        return f"{self.shortest} {value}"

    def accept(self, value: Any) -> Any:
        """The value as this option's type.

        A float may be written as text, since YAML 1.1 reads 1e-5 as text; a tuple as one text, or
        as a list of texts and numbers. Raises ValueError for another type or an unknown choice.
        """
        if value is None and self.optional:
            return None
        if self.kind is tuple:
            return self._words(value)
        if self.kind is float and type(value) is int:
            return float(value)
        if self.kind is float and type(value) is str and DECIMAL.fullmatch(value):
            return float(value)
        if type(value) is not self.kind or (self.choices and value not in self.choices):
            raise ValueError(f"{value!r} is not {self.expected}")
        return value

    def _words(self, value: Any) -> tuple[str, ...]:
        """A text, or a list of texts and numbers, as a tuple of words."""
        words = (value,) if type(value) is str else value
        sound = isinstance(words, (list, tuple)) and len(words) > 0
        if not sound or not {type(word) for word in words} <= {str, int, float}:
            raise ValueError(f"{value!r} is not {self.expected}")
        return tuple(map(str, words))

    def from_words(self, words: list[str]) -> Any:
        """The value that these words of a command line mean; `unset` is None. Raises ValueError."""
        if self.optional and words == ["unset"]:
            return None
        if self.kind is tuple:
            return self.accept(words)
        return self.accept(int(words[0]) if self.kind is int else words[0])


def options_of(kind: type, section: str = "") -> dict[str, Option]:
    """The options of one dataclass by their keys."""
    hints = get_type_hints(kind, include_extras=True)
    found = {}
    for entry in dataclasses.fields(kind):
        found[entry.name] = _option(section, entry, hints[entry.name])
    return found


def _option(section: str, entry: dataclasses.Field, hint: Any) -> Option:
    """The option of a dataclass field with a resolved type such as Annotated[int | None,
    Field()]."""
    # The annotation: Annotated[kind, Field(...)] or the kind alone.
    facts = Field()
    kind = hint
    if hasattr(hint, "__metadata__"):
        kind = hint.__origin__
        facts = next((note for note in hint.__metadata__ if isinstance(note, Field)), facts)
    # kind | None
    optional = get_origin(kind) in (Union, types.UnionType)
    if optional:
        (kind,) = (arm for arm in get_args(kind) if arm is not type(None))
    # Literal["a", "b"], or tuple[str, ...]
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    kind = str if choices else get_origin(kind) or kind
    return Option(
        entry.name,
        section,
        kind,
        optional=optional,
        choices=choices,
        default=entry.default,
        field=facts,
    )


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The most similar of `names`, or None when none is similar."""
    return next(iter(difflib.get_close_matches(name, names, 1)), None)
