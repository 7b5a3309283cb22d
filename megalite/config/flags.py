"""Reads flags, those of a run and those of a program's own. Imports no torch.

Flags and YAML files are read by the same options, so that all problems of both are reported
together and in the same words.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from megalite.config.options import Option, nearest
from megalite.config.problem import Problem

ELSEWHERE = {
    "--group-query-attention": "leave it out: --num-query-groups alone turns grouped queries on",
    "--accumulate-allreduce-grads-in-fp32": "leave it out: gradients are always summed in fp32",
    "--ddp-average-in-collective": (
        "leave it out: the loss is a mean over the global batch, so gradients are summed"
    ),
    "--override-opt_param-scheduler": "leave it out: the flags count",
    "--use-checkpoint-opt_param-scheduler": "--config with the checkpoint's config.yaml",
    "--lr-decay-samples": "--lr-decay-iters",
    "--lr-warmup-samples": "--lr-warmup-iters",
    "--lr-wsd-decay-samples": "--lr-wsd-decay-iters",
    "--rampup-batch-size": "leave it out: every global batch has the same size",
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

    switches: dict[str, tuple[Option, bool]] = field(default_factory=dict)
    """By flag: the option that takes no value, and what the flag sets it to."""
    valued: dict[str, Option] = field(default_factory=dict)
    """By flag: the option that takes a value."""
    positional: list[Option] = field(default_factory=list)
    """Options whose values come without a flag, in order."""
    rest: list[str] = field(default_factory=list)
    """Words that are still to be read."""
    values: dict[str, Any] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def add_option(self, option: Option) -> None:
        """Make the option's flags known."""
        if option.field.positional:
            self.positional.append(option)
        elif option.kind is bool:
            for flag, on in option.switches.items():
                self.switches[flag] = (option, on)
        else:
            for flag in option.flags:
                self.valued[flag] = option

    def read_word(self) -> None:
        """Read the next word, and the values that belong to it."""
        token = self.rest.pop(0)
        name, joined, text = token.partition("=")
        flag = name.replace("_", "-")
        if flag in self.switches and not joined:
            option, on = self.switches[flag]
            self.values[option.key] = on
        elif flag in self.valued:
            option = self.valued[flag]
            words = [text] if joined else self._words_of(option)
            self._read_value(option, name, words)
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
        fix = f"for example {name} {option.example}"
        expected = option.expected.replace("null", "unset")
        if not words:
            message = f"{name} needs a value: {expected}"
            self.problems.append(Problem(message, fix, (option.key,)))
            return
        try:
            self.values[option.key] = option.from_words(words)
        except ValueError:
            message = f"{name}: {' '.join(words)!r} is not {expected}"
            self.problems.append(Problem(message, fix, (option.key,)))

    def _unknown(self, token: str, flag: str) -> Problem:
        """What is wrong with a token that is neither a flag nor a flag's value."""
        if flag in self.switches:
            option, _ = self.switches[flag]
            return Problem(f"{token}: {flag} takes no value", " or ".join(option.switches))
        if not flag.startswith("-"):
            message = f"unexpected {token!r}: values follow a flag, and switches take none"
            return Problem(message, "remove it")
        if flag in ELSEWHERE:
            return Problem(f"unknown flag {flag}", ELSEWHERE[flag])
        match = nearest(flag, [*self.switches, *self.valued])
        return Problem(f"unknown flag {flag}", match or "remove it (--help lists the flags)")


def read_flags(argv: list[str], options: Iterable[Option]) -> tuple[dict[str, Any], list[Problem]]:
    """(values by key, problems) of a command line.

    `--flag value` or `--flag=value`; hyphens or underscores; the last of several wins; a value may
    not start with two dashes unless joined by `=`.
    """
    reader = _Reader(rest=list(argv))
    for option in options:
        reader.add_option(option)
    while reader.rest:
        reader.read_word()
    return reader.values, reader.problems


def missing_options(options: Iterable[Option], values: dict[str, Any]) -> list[Problem]:
    """A problem for each option that has no default and no value."""
    problems = []
    for option in options:
        if option.default is dataclasses.MISSING and option.key not in values:
            name = option.key.upper() if option.field.positional else option.flag
            fix = option.example if option.field.positional else f"{name} {option.example}"
            problems.append(Problem(f"{name} is missing", fix, (option.key,)))
    return problems
