"""Reads flags, those of a run and those of a program's own. Imports no torch.

Flags and YAML files are read by the same options, so that all problems of both are reported
together and in the same words.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from megalite.config.options import Option, nearest, options_of
from megalite.config.problem import Problem

ELSEWHERE = {
    "--group-query-attention": "leave it out: --num-query-groups alone turns grouped queries on",
    "--fp16": "--bf16: fp16 is not supported yet",
    "--wandb-save-dir": "leave it out, and set WANDB_DIR",
    "--profile-step-start": "--profile FIRST-LAST",
    "--profile-step-end": "--profile FIRST-LAST",
    "--bert-no-binary-head": "--bert-pair none",
    "--apply-residual-connection-post-layernorm": (
        "--norm-placement post: that form itself is not supported"
    ),
    "--test-data-path": "leave it out: nothing evaluates a test split yet",
    "--context-parallel-size": (
        "--sequence-parallel and --recompute-granularity: context parallelism is not supported yet"
    ),
}
"""Flags of Megatron-LM that have no counterpart of a similar name here, and what to do instead."""


@dataclass
class _Reader:
    """Reads words one by one, and collects values and problems."""

    rest: list[str]
    """Words that are still to be read."""
    known: dict[str, tuple[Option, bool | None]] = field(default_factory=dict)
    """By flag: its option and, for a switch, what the flag sets it to."""
    positional: list[Option] = field(default_factory=list)
    """Options whose values come without a flag, in order."""
    values: dict[str, Any] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def read_word(self) -> None:
        """Read the next word, and the values that belong to it."""
        token = self.rest.pop(0)
        name, joined, text = token.partition("=")
        flag = name.replace("_", "-")
        option, on = self.known.get(flag, (None, None))
        if on is not None and not joined:
            self.values[option.key] = on
        elif on is not None:
            fix = " or ".join(option.switches)
            self.problems.append(Problem(f"{token}: {flag} takes no value", fix))
        elif option is not None:
            self._read_value(option, name, [text] if joined else self._words_of(option))
        elif self.positional and not token.startswith("--"):
            self.rest.insert(0, token)
            option = self.positional.pop(0)
            self._read_value(option, option.key.upper(), self._words_of(option))
        else:
            self.problems.append(self._unknown(token, flag))
            if flag.startswith("-") and not joined and self.rest and self.rest[0][:1] != "-":
                self.rest.pop(0)  # the unknown flag's value; one problem is enough

    def _words_of(self, option: Option) -> list[str]:
        """Take the words of a value: one, or all up to the next flag for an option of several."""
        words = []
        while self.rest and not self.rest[0].startswith("--"):
            words.append(self.rest.pop(0))
            if option.kind is not tuple:
                break
        return words

    def _read_value(self, option: Option, name: str, words: list[str]) -> None:
        """Keep the value that these words mean, or the problem with it."""
        try:
            self.values[option.key] = option.from_words(words)
        except (ValueError, IndexError):
            expected = option.expected.replace("null", "unset")
            message = f"{name}: {' '.join(words)!r} is not {expected}"
            if not words:
                message = f"{name} needs a value: {expected}"
            fix = f"for example {name} {option.example}"
            self.problems.append(Problem(message, fix, (option.key,)))

    def _unknown(self, token: str, flag: str) -> Problem:
        """What is wrong with a token that is neither a flag nor a flag's value."""
        if not flag.startswith("-"):
            message = f"unexpected {token!r}: values follow a flag, and switches take none"
            return Problem(message, "remove it")
        fix = ELSEWHERE.get(flag) or nearest(flag, self.known)
        return Problem(f"unknown flag {flag}", fix or "remove it (--help lists the flags)")


def read_flags(argv: list[str], options: Iterable[Option]) -> tuple[dict[str, Any], list[Problem]]:
    """(values by key, problems) of a command line.

    `--flag value` or `--flag=value`; hyphens or underscores; the last of several wins; a value may
    not start with two dashes unless joined by `=`.
    """
    reader = _Reader(list(argv))
    for option in options:
        if option.field.positional:
            reader.positional.append(option)
        else:
            for flag, on in option.switches.items():
                reader.known[flag] = (option, on)
    while reader.rest:
        reader.read_word()
    return reader.values, reader.problems


def read_own_flags(
    kind: type, argv: list[str], others: Iterable[Option] = (), given: dict[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Any], list[Problem]]:
    """(values of the fields of the dataclass `kind`, values of the other options, problems) of a
    command line.

    given: values that the command line may leave out or replace. A value out of range, or missing
    where there is no default, is a problem.
    """
    own = options_of(kind)
    values, problems = read_flags(argv, [*others, *own.values()])
    refused = {key for problem in problems for key in problem.flags}
    taken = dict(given or {})
    for key, option in own.items():
        if key in values:
            taken[key] = values.pop(key)
        elif option.default is dataclasses.MISSING and key not in (*taken, *refused):
            name = key.upper() if option.field.positional else option.flag
            fix = option.example if option.field.positional else f"{name} {option.example}"
            problems.append(Problem(f"{name} is missing", fix, (key,)))
        problem = option.problem_with(taken.get(key))
        if problem is not None:
            problems.append(problem)
    return taken, values, problems
