"""Checks of a whole configuration, before anything is started. Imports no torch.

A rule is a small function of (config, world_size) that yields a Finding for each thing wrong, with
possible fixes. Each is tried against all the rules before it is printed, so what is printed as a
fix works. Values that make no sense on their own are reported first and replaced by their defaults,
so that no rule sees them. Whatever would be silently ignored is a problem.
"""

import os
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

from megalite.checkpoint.folder import CheckpointError
from megalite.config.problem import ConfigError, Problem
from megalite.config.rules.balance import BALANCE_RULES
from megalite.config.rules.bert import BERT_FILE_RULES, BERT_RULES
from megalite.config.rules.deepspeed import DEEPSPEED_FILE_RULES, DEEPSPEED_RULES
from megalite.config.rules.effects import nothing_is_ignored, other_ranks_exist
from megalite.config.rules.files import FILE_RULES
from megalite.config.rules.finding import (
    Finding,
    Rule,
    batch_sizes,
    global_batch,
    iterations,
    schedule,
)
from megalite.config.rules.gpt import GPT_FILE_RULES, GPT_RULES
from megalite.config.rules.layout import LAYOUT_RULES
from megalite.config.rules.resume import RESUME_RULES, rule_of_changes
from megalite.config.rules.run import RUN_RULES
from megalite.config.rules.schedule import SCHEDULE_FILE_RULES, SCHEDULE_RULES
from megalite.config.rules.tokenizer import build_tokenizer, files_of
from megalite.config.run import (
    RunConfig,
    contradictions,
    options,
    shape_of,
    to_flat,
    with_published,
    with_values,
)
from megalite.config.schedule import schedule_fields
from megalite.convert.published import Published, read_published
from megalite.models.presets import preset

PURE_RULES: tuple[Rule, ...] = (
    *LAYOUT_RULES,
    *SCHEDULE_RULES,
    *BALANCE_RULES,
    *RUN_RULES,
    *DEEPSPEED_RULES,
    nothing_is_ignored,
    other_ranks_exist,
)
"""Rules of every architecture that read no file."""
RULES_OF = {"gpt": (*PURE_RULES, *GPT_RULES), "bert": (*PURE_RULES, *BERT_RULES)}
"""Rules that read no file, by architecture."""
COMMON_FILE_RULES: tuple[Rule, ...] = (
    *FILE_RULES,
    *RESUME_RULES,
    *DEEPSPEED_FILE_RULES,
    *SCHEDULE_FILE_RULES,
)
FILE_RULES_OF = {
    "gpt": (*COMMON_FILE_RULES, *GPT_FILE_RULES),
    "bert": (*COMMON_FILE_RULES, *BERT_FILE_RULES),
}
"""Rules that read files, by architecture."""
FIXES_PER_FLAG = 2
"""Values shown for one flag in a fix, the nearest first."""

Failures = set[tuple[str, tuple[str, ...]]]
"""(rule, keys) of findings."""


def check(
    config: RunConfig, world_size: int, given: Collection[str] | None = None
) -> list[Problem]:
    """Every problem of the configuration for this many ranks; [] when it is sound. Reads files, but
    little of them.

    given: keys of the fields that the user named; None: all.
    """
    # Single values.
    problems = out_of_range(config)
    senseless = {key for problem in problems for key in problem.keys}
    sane = with_values(config, {key: options()[key].default for key in senseless})
    # Values together, and with files.
    architecture = sane.model.architecture
    file_rules = FILE_RULES_OF[architecture]
    if given is not None:
        file_rules = (*file_rules, rule_of_changes(given))
    found = [
        *problems_by(RULES_OF[architecture], sane, world_size),
        *problems_by(file_rules, sane, world_size, of_node=True),
    ]
    return [*problems, *(p for p in found if senseless.isdisjoint(p.keys))]


def check_checkpoint(
    config: RunConfig, world_size: int, given: Collection[str] | None
) -> list[Problem]:
    """The problems of `check` that the checkpoint to load has with the run."""
    rules = RESUME_RULES if given is None else (*RESUME_RULES, rule_of_changes(given))
    return problems_by(rules, config, world_size, of_node=True)


def problems_by(
    rules: Iterable[Rule], config: RunConfig, world_size: int, of_node: bool = False
) -> list[Problem]:
    """What these rules find, with the fixes that work."""
    before = failures(config, world_size)
    problems = []
    for rule in rules:
        for finding in rule(config, world_size):
            fix = _working_fixes(config, world_size, rule, finding=finding, before=before)
            problems.append(Problem(finding.message, fix, finding.keys, of_node))
    return problems


def out_of_range(config: RunConfig) -> list[Problem]:
    """Problems of single values, whatever the other fields say."""
    found = [options()[key].problem_with(value) for key, value in to_flat(config).items()]
    return [problem for problem in found if problem is not None]


def failures(config: RunConfig, world_size: int) -> Failures:
    """(rule, keys) of every finding of the rules that read no file."""
    found = set()
    for rule in RULES_OF[config.model.architecture]:
        for finding in rule(config, world_size):
            found.add((rule.__name__, finding.keys))
    return found


def _working_fixes(
    config: RunConfig, world_size: int, rule: Rule, finding: Finding, before: Failures
) -> str:
    """The possible fixes that work and break nothing that was sound, as flags to type: `--tp 2, or
    --tp 1`. When none does: the first, to try once the other problems are fixed."""
    others = before - {(rule.__name__, finding.keys)}
    shape = _given_shape(config)
    fixes = []
    shown = {}
    possible = list(_without_contradictions(config, finding.fixes))
    for fix in possible:
        if isinstance(fix, str):
            fixes.append(fix)
            continue
        keys = tuple(fix)
        text = _typed(fix, shape)
        # No flag takes back a value that the preset sets.
        needs_unset = any(value is None and key in shape for key, value in fix.items())
        if needs_unset or text in fixes or shown.get(keys, 0) == FIXES_PER_FLAG:
            continue
        # Try it.
        values = {key: value for key, value in fix.items() if key != "world_size"}
        changed = with_values(config, values)
        if failures(changed, fix.get("world_size", world_size)) <= others:
            shown[keys] = shown.get(keys, 0) + 1
            fixes.append(text)
    if not fixes and possible:
        fixes = [_typed(possible[0], shape) + " (once the other problems are fixed)"]
    elif not fixes and finding.fixes:
        fixes = ["--load-hf FOLDER of another model"]
    return ", or ".join(fixes)


def _published(config: RunConfig) -> Published | None:
    """The model of --load-hf; None without one, or where a run that resumes has lost it."""
    if config.checkpoint.load_hf:
        with suppress(CheckpointError):
            return read_published(config.checkpoint.load_hf)
    return None


def _given_shape(config: RunConfig) -> dict[str, Any]:
    """The fields that --load-hf or the preset sets, by key."""
    published = _published(config)
    return preset(config.model.preset) if published is None else shape_of(published)


def _without_contradictions(
    config: RunConfig, fixes: Iterable[dict[str, Any] | str]
) -> Iterator[dict[str, Any] | str]:
    """The fixes that change nothing of the model of --load-hf."""
    published = _published(config)
    for fix in fixes:
        if published is None or isinstance(fix, str) or not contradictions(fix, published):
            yield fix


def _typed(change: dict[str, Any], shape: dict[str, Any]) -> str:
    """A change as one would type it: `start 8 ranks --tp 2`, or `leave out --split` where that does
    it. A switch is always typed, since a YAML file may have set it. shape: what the preset sets."""
    typed = []
    for key, value in change.items():
        option = options()[key]
        if key == "world_size":
            typed.append(f"start {value} ranks")
        elif (
            value == shape.get(key, option.default) and option.kind is not bool and len(change) == 1
        ):
            typed.append(f"leave out {option.flag}")
        else:
            typed.append(option.setting(value))
    return " ".join(typed)


def resolve(config: RunConfig, world_size: int) -> RunConfig:
    """A sound configuration with every value filled in that follows from others or from the
    tokenizer. Paths of the tokenizer's files and of --load-hf become absolute. Resolving it again
    changes nothing.

    Short forms are replaced by what they stand for (bf16 and fp16 -> precision,
    recompute_activations -> recompute_granularity, lr_warmup_fraction -> lr_warmup_iters
    unless samples are counted; train_samples and train_tokens -> train_iters, kept beside them).
    """
    size = config.model.vocab_size
    if size is None:
        size = getattr(build_tokenizer(config), "vocab_size", None)
    values = {"vocab_size": size}
    for field in files_of(config):
        # The checkpoint's configuration must name the files for programs that start elsewhere.
        values[field] = os.path.abspath(getattr(config.data, field))
    if config.checkpoint.load_hf:
        # Its config.json is written again when a checkpoint is converted, wherever that is done.
        values["load_hf"] = os.path.abspath(config.checkpoint.load_hf)
    return fill_in(with_values(config, values), world_size)


def fill_in(config: RunConfig, world_size: int) -> RunConfig:
    """`resolve`, without the tokenizer."""
    o = config.optimizer
    plan = schedule(config, world_size)
    values = {
        "recompute_granularity": config.recompute.granularity,
        "recompute_activations": False,
        "precision": o.chosen_precision,
        "bf16": False,
        "fp16": False,
        "global_batch_size": global_batch(config, world_size),
        "rampup_batch_size": batch_sizes(config, world_size).words,
        "train_iters": iterations(config, world_size),
    }
    if o.lr_decay_style != "constant":
        values["min_lr"] = o.lowest_lr
        if o.lr_decay_style != "inverse-square-root" and not o.counts_samples:
            values["lr_decay_iters"] = plan.decay
    # The end in samples is not known before a checkpoint says how many are consumed.
    if o.lr_warmup_fraction is not None and not o.counts_samples:
        values["lr_warmup_iters"] = plan.warmup
        values["lr_warmup_fraction"] = None
    filled = replace(with_values(config, values), model=config.model.filled())
    return with_values(filled, schedule_fields(filled, world_size))


def chosen(config: RunConfig, world_size: int) -> dict[str, Any]:
    """The values of a resolved configuration that were chosen: those that are neither their field's
    default, nor those of the preset or of --load-hf, nor follow from the others."""
    shape = preset(config.model.preset)
    if config.checkpoint.load_hf:
        # A run that resumes may have lost the folder.
        with suppress(ConfigError):
            # Absolute, as the paths of the tokenizer are in a resolved configuration.
            shape = with_published({"load_hf": os.path.abspath(config.checkpoint.load_hf)})
            del shape["load_hf"]
    found = {}
    for key, option in options().items():
        value = getattr(getattr(config, option.section), key)
        if value == shape.get(key, option.default):
            continue
        without = with_values(config, {key: shape.get(key, option.default)})
        if fill_in(without, world_size) != config:
            found[key] = value
    return found
