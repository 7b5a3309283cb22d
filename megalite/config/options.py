"""The fields of configuration dataclasses as options: flag, type, choices, facts. Imports no torch.

The dataclasses are the only list of flags. Names, types, choices, defaults and the `Field` of the
annotation are read from them here.
"""

import dataclasses
import difflib
import re
import shlex
import types
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from megalite.config.problem import Problem
from megalite.fields import Field

DECIMAL = re.compile(r"[-+]?((0|[1-9]\d*)(\.\d*)?|\.\d+)([eE][-+]?\d+)?", re.ASCII)
"""A number written in decimal digits, without leading zeros."""
INT_LIMIT = 2**63
"""Whole numbers are stored in 64 bits."""


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
    def switches(self) -> dict[str, bool | None]:
        """What each flag sets the option to; None where the value follows the flag.

        A bool has a flag for True and one for False: the opposite of --no-x is --x.
        """
        if self.kind is not bool:
            return dict.fromkeys(self.flags)
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
        """A value that the option takes, as on a command line: its default where it has one."""
        usual = self.usual
        if isinstance(usual, tuple):
            return shlex.join(usual)
        if usual is not None:
            return str(usual).lower() if self.kind is bool else str(usual)
        if self.choices:
            return self.choices[0]
        return {int: "1", float: "1.0"}.get(self.kind, "NAME")

    @property
    def example_in_yaml(self) -> str:
        """The same value, as in a YAML file."""
        if isinstance(self.usual, tuple):
            return "[" + ", ".join(f"'{word}'" for word in self.usual) + "]"
        return self.example

    @property
    def usual(self) -> Any:
        """The default, or the example of the annotation, or None."""
        has_default = self.default is not None and self.default is not dataclasses.MISSING
        return self.default if has_default else self.field.example

    def setting(self, value: Any) -> str:
        """The command line that sets this value, with the shortest flag: `--tp 4`."""
        if self.kind is bool:
            return min((flag for flag, on in self.switches.items() if on == value), key=len)
        shortest = min(self.flags, key=len)
        if value is None:
            value = "unset"
        elif self.kind is tuple:
            value = shlex.join(value)
        elif isinstance(value, float) and float(f"{value:g}") == value:
            value = f"{value:g}"
        return f"{shortest} {value}"

    def accept(self, value: Any) -> Any:
        """The value as this option's type.

        A float may be written as text, since YAML 1.1 reads 1e-5 as text; a tuple as one text, or
        as a list of texts and numbers. Raises ValueError for another type or an unknown choice.
        """
        if value is None and self.optional:
            return None
        if self.kind is tuple:
            words = (value,) if type(value) is str else value
            if isinstance(words, (list, tuple)) and words:
                if {type(word) for word in words} <= {str, int, float}:
                    return tuple(map(str, words))
        elif self.kind is float and type(value) in (int, str):
            if type(value) is int or DECIMAL.fullmatch(value):
                return float(value)
        elif type(value) is self.kind and (not self.choices or value in self.choices):
            return value
        raise ValueError(f"{value!r} is not {self.expected}")

    def from_words(self, words: list[str]) -> Any:
        """The value that these words of a command line mean; `unset` is None. Raises ValueError."""
        if self.optional and words == ["unset"]:
            return None
        if self.kind is tuple:
            return self.accept(words)
        return self.accept(int(words[0]) if self.kind is int else words[0])

    def problem_with(self, value: Any) -> Problem | None:
        """What is wrong with a value on its own: an empty text, or a number outside the bounds that
        the field's annotation gives."""
        if value == "" and self.default != "":
            fix = f"leave out {self.flag}, or give a value"
            return Problem(f"{self.flag} is empty", fix, (self.key,))
        if self.kind not in (int, float) or value is None:
            return None
        if self.field.contains(value) and (self.kind is float or value < INT_LIMIT):
            return None
        bounds = self.field.bounds
        if self.kind is int:
            most = "" if self.field.maximum is None else f" to {self.field.maximum}"
            bounds = f"a whole number from {self.field.minimum}{most}"
        message = f"{self.flag} {value} must be {bounds}"
        fix = f"leave out {self.flag}" if self.usual is None else self.setting(self.usual)
        return Problem(message, fix, (self.key,))


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
    kind = getattr(hint, "__origin__", hint) if hasattr(hint, "__metadata__") else hint
    facts = Field()
    for note in getattr(hint, "__metadata__", ()):
        if isinstance(note, Field):
            facts = note
    # kind | None
    optional = get_origin(kind) in (Union, types.UnionType)
    if optional:
        (kind,) = (arm for arm in get_args(kind) if arm is not type(None))
    # Literal["a", "b"], or tuple[str, ...]
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    kind = str if choices else get_origin(kind) or kind
    facts_of_type = {"optional": optional, "choices": choices}
    return Option(entry.name, section, kind, **facts_of_type, default=entry.default, field=facts)


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The most similar of `names`, or None when none is similar."""
    by_lower_case = {known.lower(): known for known in names}
    found = difflib.get_close_matches(name.lower(), by_lower_case, 1)
    return by_lower_case[found[0]] if found else None
