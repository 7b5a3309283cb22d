"""What the code knows about one configuration field, written in the field's annotation.

    hang_timeout: Annotated[float, Field(minimum=0, changes_numbers=False)] = 300.0

Meaning and unit stand in the docstring below the field; `--help` prints it.
"""

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Field:
    """Facts about one field. The defaults describe a field that nothing special is known about."""

    aliases: tuple[str, ...] = ()
    """Short flags: ("--tp",)."""
    metavar: str = ""
    """Name of the value in `--help`. Empty: the name of its type."""
    positional: bool = False
    """The value is given without a flag."""
    example: Any = None
    """A value to offer where the field has no default."""
    minimum: float | None = None
    """Least value of a number."""
    above: float | None = None
    """A number must be greater than this; in place of `minimum`."""
    maximum: float | None = None
    """Greatest value of a number."""
    below: float | None = None
    """A number must be less than this; in place of `maximum`."""
    changes_numbers: bool = True
    """False: no loss and no weight depends on the value, so it may change when a run resumes."""
    defines_model: bool = False
    """True: a checkpoint made with another value holds another model."""
    keeps_shapes: bool = False
    """True, of a field that defines the model: the weights have the same names and shapes with
    every value, so that nothing but a check notices another one."""
    needs_library: str = ""
    """Optional library to import when the field is set."""
    needs_eod: bool = False
    """True: the feature looks for the token that ends a document."""

    def contains(self, value: float) -> bool:
        """Whether a number is finite and within the bounds."""
        return (
            math.isfinite(value)
            and (self.minimum is None or value >= self.minimum)
            and (self.above is None or value > self.above)
            and (self.maximum is None or value <= self.maximum)
            and (self.below is None or value < self.below)
        )

    @property
    def bounds(self) -> str:
        """The bounds in words: `at least 0 and below 1`."""
        words = {
            "at least": self.minimum,
            "above": self.above,
            "at most": self.maximum,
            "below": self.below,
        }
        given = [f"{word} {bound:g}" for word, bound in words.items() if bound is not None]
        return " and ".join(given if len(given) > 1 else [*given, "finite"])
