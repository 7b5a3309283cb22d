"""Values that make no sense on their own. Imports no torch."""

from typing import Any

from megalite.config.options import Option
from megalite.config.problem import Problem
from megalite.config.run import RunConfig, options, to_flat

INT_LIMIT = 2**63
"""Whole numbers are stored in 64 bits."""


def out_of_range(config: RunConfig) -> list[Problem]:
    """Problems of single values, whatever the other fields say."""
    found = [problem_of(options()[key], value) for key, value in to_flat(config).items()]
    return [problem for problem in found if problem is not None]


def problem_of(option: Option, value: Any) -> Problem | None:
    """What is wrong with a value on its own: an empty text, or a number outside the bounds that the
    field's annotation gives."""
    if value == "":
        fix = f"leave out {option.flag}, or give a value"
        return Problem(f"{option.flag} is empty", fix, (option.key,))
    if option.kind not in (int, float) or value is None or _within(option, value):
        return None
    message = f"{option.flag} {value} must be {_bounds(option)}"
    return Problem(message, option.setting(option.usual), (option.key,))


def _within(option: Option, value: float) -> bool:
    return option.field.contains(value) and (option.kind is float or value < INT_LIMIT)


def _bounds(option: Option) -> str:
    if option.kind is int:
        return f"a whole number from {option.field.minimum}"
    return option.field.bounds
