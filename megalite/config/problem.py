"""What is wrong with a configuration, in words for its author. Imports no torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a configuration."""

    message: str
    """What is wrong, with the values involved."""
    fix: str
    """What would work. Empty: the message says it."""
    keys: tuple[str, ...] = ()
    """Names of the fields involved."""
    of_node: bool = False
    """Whether it may come from the files of one node, so that other nodes need not have it."""


class ConfigError(ValueError):
    """Raised with every problem found, not only the first."""

    def __init__(self, problems: list[Problem]):
        super().__init__("; ".join(f"{p.message} (fix: {p.fix})" for p in problems))
        self.problems = problems
