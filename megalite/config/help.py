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
        lines += ["", f"{title}:", *wrapped(inspect.getdoc(kind), "  ", "  ", width=width), ""]
        texts = _field_docstrings(kind)
        # Options that must be given come first.
        known = options_of(kind).values()
        for option in sorted(known, key=lambda o: o.default is not dataclasses.MISSING):
            default = defaults.get(option.key, option.default)
            text = texts[option.key]
            if default is not dataclasses.MISSING:
                shown = " ".join(default) if isinstance(default, tuple) else default
                text += f" (default: {'unset' if default is None else shown})"
            lines += _entry(_flags(option, default), text, width)
    return "\n".join(lines)


def wrapped(text: str, first: str, rest: str = "", width: int = WIDEST) -> list[str]:
    """Lines of at most `width` columns: the first begins with `first`, the others with `rest`
    (unless given, spaces as wide as `first`). Words such as --tp stay whole."""
    return textwrap.wrap(
        text,
        width,
        initial_indent=first,
        subsequent_indent=rest or " " * len(first),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _entry(flags: str, text: str, width: int) -> list[str]:
    """The lines of one flag: its text beside it, or below it where the flag is long."""
    below = wrapped(text, " " * FLAG_COLUMNS, width=width)
    if len(flags) + 4 > FLAG_COLUMNS:
        return [*wrapped(flags, "  ", width=width), *below]
    return [f"  {flags}".ljust(FLAG_COLUMNS) + below[0].lstrip(), *below[1:]]


def _flags(option: Option, default: Any) -> str:
    """`--tp INT, --tensor-model-parallel-size INT`; for a switch, the flags that change it."""
    if option.kind is bool:
        return ", ".join(flag for flag, on in option.switches.items() if on is not default)
    # How a value is shown: INT, {1f1b, gpipe}, or STR ... for several words.
    kind = "STR" if option.kind is tuple else option.kind.__name__.upper()
    metavar = option.key.upper() if option.field.positional else kind
    if option.choices:
        metavar = "{" + ", ".join(option.choices) + "}"
    if option.kind is tuple:
        metavar += " ..."
    metavar = option.field.metavar or metavar
    if option.field.positional:
        return metavar
    return ", ".join(f"{flag} {metavar}" for flag in option.flags)


def _field_docstrings(kind: type) -> dict[str, str]:
    """The docstring below each field of a dataclass, those of its bases included, on one line."""
    found = {}
    for base in reversed(kind.__mro__[:-1]):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        for statement, after in itertools.pairwise(definition.body):
            if isinstance(statement, ast.AnnAssign) and isinstance(after, ast.Expr):
                found[statement.target.id] = " ".join(after.value.value.split())
    return found
