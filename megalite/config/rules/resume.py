"""What a run that resumes must say itself, or leave as the checkpoint has it. Imports no torch."""

from collections.abc import Collection, Iterator
from typing import Any

from megalite.config.rules.files import checkpoint_to_load
from megalite.config.rules.finding import Finding, Rule, flag_of, global_batch
from megalite.config.run import RunConfig, options

BESIDE_OPTIMIZER = (
    "seq_length",
    "attention_dropout",
    "hidden_dropout",
    "global_batch_size",
    "rampup_batch_size",
    "eod_mask_loss",
    "reset_position_ids",
    "reset_attention_mask",
    "mask_prob",
    "rng_scheme",
)
"""Fields of other sections than the optimizer's that the losses of a training depend on, beside the
data and the shape of the model, which have rules of their own."""
FOLLOWS = frozenset({"bf16", "fp16", "max_bad_steps"})
"""Fields of the optimizer that say nothing of their own, or change nothing that went well."""
SHORT_FORMS = {
    "precision": ("bf16", "fp16"),
    "lr_warmup_iters": ("lr_warmup_fraction", "lr_warmup_samples"),
}
"""Fields that may set another one."""


def rule_of_changes(given: Collection[str]) -> Rule:
    """The rule that what a run has by default, and not because it was given, is the checkpoint's.

    given: keys of the fields that the command line or its file names.
    """

    def changes_are_asked_for(config: RunConfig, world_size: int) -> Iterator[Finding]:
        c = config.checkpoint
        folder, made_with = checkpoint_to_load(config)
        if made_with is None or c.finetune:
            return
        for key in _watched():
            asked = {key, *SHORT_FORMS.get(key, ())}
            there = getattr(getattr(made_with, options()[key].section), key)
            here = _value(config, key, world_size)
            if asked.isdisjoint(given) and there is not None and there != here:
                flag = flag_of(key)
                shown = "unset" if here is None else options()[key].setting(here)
                yield Finding(
                    f"{folder} was made with {options()[key].setting(there)}; this run does not "
                    f"give {flag}, and would go on with {shown}",
                    {key: there},
                    f"{shown} where the change is meant",
                )

    return changes_are_asked_for


def _watched() -> list[str]:
    """Keys of the fields that the rule compares: those with a default of their own."""
    found = list(BESIDE_OPTIMIZER)
    for key, option in options().items():
        of_optimizer = option.section == "optimizer" and option.field.changes_numbers
        if of_optimizer and option.default is not None and key not in FOLLOWS:
            found.append(key)
    return found


def _value(config: RunConfig, key: str, world_size: int) -> Any:
    """The value that a run would have."""
    if key == "precision":
        return config.optimizer.chosen_precision
    if key == "global_batch_size":
        return global_batch(config, world_size)
    return getattr(getattr(config, options()[key].section), key)
