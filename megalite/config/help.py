"""The text of --help, drawn from the dataclasses. Imports no torch."""

import ast
import dataclasses
import inspect
import itertools
import os
import shutil
import sys
import textwrap
from typing import Any

from megalite.config.options import Option, options_of

WIDEST = 100
"""Columns that the text is wrapped to, at most."""
FLAG_COLUMNS = 27
"""Columns of the flags, before what they do."""


def help_text(description: str, groups: dict[str, type], defaults: dict[str, Any]) -> str:
    """The description as it stands, then the flags of each group under its title.

    groups: dataclasses by title. defaults: values by key that the program has in place of the
    dataclass's own.
    """
    width = min(WIDEST, shutil.get_terminal_size().columns)
    program = os.path.basename(sys.argv[0])
    lines = [description.strip(), "", f"usage: {program} [-h] [OPTIONS]", ""]
    lines += _entry("-h, --help", "Show this help message and exit.", width)
    for title, kind in groups.items():
        lines += ["", f"{title}:", *_wrapped(inspect.getdoc(kind), width, "  "), ""]
        texts = _field_docstrings(kind)
        for key, option in options_of(kind).items():
            default = defaults.get(key, option.default)
            text = texts[key]
            if default is not dataclasses.MISSING:
                text += f" (default: {_shown(default)})"
            lines += _entry(_flags(option, default), text, width)
    return "\n".join(lines)


def _entry(flags: str, text: str, width: int) -> list[str]:
    """The lines of one flag: its text beside it, or below it where the flag is long."""
    below = _wrapped(text, width, " " * FLAG_COLUMNS)
    if len(flags) + 4 > FLAG_COLUMNS:
        return [*_wrapped(flags, width, "  "), *below]
    return [f"  {flags}".ljust(FLAG_COLUMNS) + below[0].lstrip(), *below[1:]]


def _wrapped(text: str, width: int, indent: str) -> list[str]:
    return textwrap.wrap(
        text,
        width,
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _flags(option: Option, default: Any) -> str:
    """`--tp INT, --tensor-model-parallel-size INT`; for a switch, the flags that change it."""
    if option.field.positional:
        return _metavar(option)
    if option.kind is bool:
        return ", ".join(flag for flag, on in option.switches.items() if on is not default)
    return ", ".join(f"{flag} {_metavar(option)}" for flag in option.flags)


def _metavar(option: Option) -> str:
    """How a value is shown: INT, {1f1b,gpipe}, or STR ... for several words."""
    if option.field.metavar:
        return option.field.metavar
    if option.choices:
        return "{" + ", ".join(option.choices) + "}"
    if option.field.positional:
        name = option.key.upper()
    else:
        name = "STR" if option.kind is tuple else option.kind.__name__.upper()
    return f"{name} ..." if option.kind is tuple else name


def _shown(default: Any) -> str:
    if default is None:
        return "unset"
    return " ".join(default) if isinstance(default, tuple) else str(default)


def _field_docstrings(kind: type) -> dict[str, str]:
    """The docstring below each field of a dataclass, those of its bases included, on one line."""
    found = {}
    for base in reversed(kind.__mro__[:-1]):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        statements = definition.body
        for statement, after in itertools.pairwise(statements):
            if isinstance(statement, ast.AnnAssign) and isinstance(after, ast.Expr):
                found[statement.target.id] = " ".join(after.value.value.split())
    return found
