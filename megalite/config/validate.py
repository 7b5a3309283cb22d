"""Checks of a whole configuration, before anything is started. Imports no torch.

A rule is a small function of (config, world_size) that yields a Finding for each thing wrong, with candidates for a
fix. Every candidate is tried against all the rules before it is offered, so what is printed as a fix works. Values that
make no sense on their own are reported first and replaced by their defaults, so that no rule sees them.
Whatever would be silently ignored is a problem.
"""

import os
from typing import Any

from megalite.config.rules.bert import BERT_RULES
from megalite.config.rules.files import FILE_RULES
from megalite.config.rules.finding import PATHS, Finding, Rule, global_batch, iterations
from megalite.config.rules.layout import LAYOUT_RULES
from megalite.config.rules.run import RUN_RULES
from megalite.config.rules.tokenizer import build_tokenizer
from megalite.config.rules.values import nothing_is_ignored, out_of_range
from megalite.config.run import Problem, RunConfig, options, with_values
from megalite.data.config import TOKENIZER_FILES

PURE_RULES: tuple[Rule, ...] = (*LAYOUT_RULES, *RUN_RULES, *BERT_RULES, nothing_is_ignored)
"""Every rule that reads no file."""
OFFERED_PER_FLAG = 2
"""Values offered for one flag in a fix, the nearest first."""


def check(config: RunConfig, world_size: int) -> list[Problem]:
    """Every problem of the configuration for this many ranks; [] when it is sound. Reads files, but little of them."""
    problems = out_of_range(config)
    senseless = {flag for problem in problems for flag in problem.flags}
    sane = with_values(config, {key: options()[key].default for key in senseless})
    found = [
        (rule, finding) for rule in (*PURE_RULES, *FILE_RULES) for finding in rule(sane, world_size)
    ]
    before = failures(sane, world_size)
    for rule, finding in found:
        if senseless.isdisjoint(finding.flags):
            fix = ", or ".join(_offers(sane, world_size, rule, finding, before))
            problems.append(Problem(finding.message, fix, finding.flags))
    return problems


def concerns_files(problem: Problem) -> bool:
    """Whether a problem may come from the files of one node, so that other nodes need not have it."""
    named = {*PATHS, "tokenizer_model", "vocab_file", "merge_file", "load", "save", "metrics_file"}
    return bool(named.intersection(problem.flags))


def failures(config: RunConfig, world_size: int) -> set[tuple[str, tuple[str, ...]]]:
    """(rule, flags) of every finding of the rules that read no file."""
    return {
        (rule.__name__, finding.flags)
        for rule in PURE_RULES
        for finding in rule(config, world_size)
    }


def _offers(
    config: RunConfig, world_size: int, rule: Rule, finding: Finding, before: set
) -> list[str]:
    """The candidates that repair the finding and break nothing that was sound, as flags to type."""
    offers, offered, alone = [], {}, (rule.__name__, finding.flags)
    for candidate in finding.candidates:
        if isinstance(candidate, str):
            offers.append(candidate)
            continue
        keys = tuple(candidate)
        values = {key: value for key, value in candidate.items() if key != "world_size"}
        after = failures(with_values(config, values), candidate.get("world_size", world_size))
        if offered.get(keys, 0) < OFFERED_PER_FLAG and after <= before - {alone}:
            offered[keys] = offered.get(keys, 0) + 1
            offers.append(_typed(candidate))
    return offers or [
        _typed(c) + " (with the other problems mended)" for c in finding.candidates[:1]
    ]


def _typed(candidate: dict[str, Any]) -> str:
    """A change as one would type it: `start 8 ranks --tp 2`, or `leave out --split` where that does it. A switch is
    always typed, since a YAML file may have set it."""
    typed = []
    for key, value in candidate.items():
        option = options()[key]
        if key == "world_size":
            typed.append(f"start {value} ranks")
        elif value == option.default and option.kind is not bool and len(candidate) == 1:
            typed.append(f"leave out {option.flag}")
        else:
            typed.append(option.setting(value))
    return " ".join(typed)


def resolve(config: RunConfig, world_size: int) -> RunConfig:
    """A sound configuration with every value filled in that follows from others. Resolving it again changes nothing.

    Short forms are replaced by what they stand for (bf16 -> precision, recompute_activations -> recompute_granularity,
    lr_warmup_fraction -> lr_warmup_iters, train_samples -> train_iters, kept beside it). The paths of the tokenizer's
    files become absolute.
    """
    m, o = config.model, config.optimizer
    steps = iterations(config, world_size)
    decay = o.lr_decay_iters or steps
    values = {
        "ffn_hidden_size": m.ffn,
        "kv_channels": m.head_size,
        "num_query_groups": m.query_groups,
        "max_position_embeddings": m.positions,
        "vocab_size": m.vocab_size or getattr(build_tokenizer(config), "vocab_size", None),
        "recompute_granularity": config.recompute.granularity,
        "recompute_activations": False,
        "precision": "bf16" if o.bf16 else o.precision,
        "bf16": False,
        "global_batch_size": global_batch(config, world_size),
        "train_iters": steps,
    }
    for field in TOKENIZER_FILES.get(config.data.tokenizer_type, ()):
        # The checkpoint's configuration must name the files for programs that start elsewhere.
        values[field] = os.path.abspath(getattr(config.data, field))
    if o.lr_decay_style != "constant":
        values["lr_decay_iters"] = decay
    if o.lr_warmup_fraction is not None:
        values |= {
            "lr_warmup_iters": round(o.lr_warmup_fraction * decay),
            "lr_warmup_fraction": None,
        }
    return with_values(config, values)
