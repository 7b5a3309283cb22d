"""Rules that compare a run with the checkpoint that it loads: its model, data and optimizer, and
what it must say itself, or leave as the checkpoint has it. Imports no torch."""

from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any

from megalite.checkpoint.folder import CheckpointError
from megalite.checkpoint.text_files import read_state_file
from megalite.config.rules.effects import NEEDS_VALUE, nothing_is_ignored
from megalite.config.rules.files import checkpoint_to_load, weights_to_load
from megalite.config.rules.finding import (
    Finding,
    Rule,
    batch_sizes,
    flag_of,
    global_batch,
    iterations,
)
from megalite.config.run import RunConfig, keys_where, options, with_values
from megalite.data.build import data_state
from megalite.data.indexed import DatasetError
from megalite.data.sources import DataState

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
ALTERNATIVES = {
    "precision": ("bf16", "fp16"),
    "lr_warmup_iters": ("lr_warmup_fraction", "lr_warmup_samples"),
    "lr_warmup_samples": ("lr_warmup_fraction", "lr_warmup_iters"),
    "lr_warmup_fraction": ("lr_warmup_iters", "lr_warmup_samples"),
    "lr_decay_iters": ("lr_decay_samples",),
    "lr_decay_samples": ("lr_decay_iters",),
    "lr_wsd_decay_iters": ("lr_wsd_decay_samples",),
    "lr_wsd_decay_samples": ("lr_wsd_decay_iters",),
}
"""Fields that may be given in place of one."""
TOGETHER = (
    ("lr_decay_style", "lr_wsd_decay_iters", "lr_wsd_decay_samples", "lr_wsd_decay_style"),
    ("weight_decay_incr_style", "start_weight_decay", "end_weight_decay"),
    ("decoupled_lr", "decoupled_min_lr"),
)
"""Fields that have an effect, or make sense, only with one another."""


def checkpoint_fits_model(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """The checkpoint holds this model, not one with other layers, widths, norms or positions."""
    folder, made_with = weights_to_load(config)
    if made_with is None:
        return
    # The architecture.
    there = made_with.model.architecture
    here = config.model.architecture
    if there != here:
        yield Finding(
            f"the model in {folder} is a {there.upper()}, this run's is a {here.upper()}",
            f"pretrain_{there}.py resumes it",
            "--load another folder",
        )
        return
    # The heads.
    if made_with.pair_head != config.pair_head:
        there = made_with.bert.bert_pair
        heads = "has no pair head" if there == "none" else "has a pair head"
        yield Finding(
            f"the model in {folder} {heads} (--bert-pair {there}), this run has --bert-pair "
            f"{config.bert.bert_pair}",
            {"bert_pair": there},
        )
    # The shape.
    stored = made_with.model.filled()
    wanted = config.model.filled()
    keys = set(keys_where(lambda field: field.defines_model))
    if stored.position_embedding_type != "learned_absolute":
        keys.discard("max_position_embeddings")  # of RoPE it is only a limit
    if config.model.vocab_size is None:
        keys.discard("vocab_size")
    hidden = set(keys_where(lambda field: field.keeps_shapes))
    if config.checkpoint.allow_model_change:
        keys -= hidden
    for key in options():
        there = getattr(stored, key, None)
        here = getattr(wanted, key, None)
        if key in keys and there != here:
            message = f"the model in {folder} has {key} {there}, this run has {here}"
            fixes = [{key: there}]
            if key in hidden:
                fixes.append({"allow_model_change": True})
            yield Finding(message, *fixes, also=(key,))


def data_is_the_checkpoints(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """The training data and its order are those that the checkpoint was made with, or the change is
    allowed."""
    if config.checkpoint.finetune or config.checkpoint.allow_data_change:
        return
    folder, made_with = checkpoint_to_load(config)
    if made_with is None or made_with.model.architecture != config.model.architecture:
        return  # another rule reports another model
    try:
        state = read_state_file(folder)
        if state.get("data") is None:
            return
        differences = _data_differences(config, world_size, state)
        if not differences:
            return
        fixes = _same_samples(config, world_size, state, made_with)
    except (
        CheckpointError,
        DatasetError,
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
    ):
        return  # other rules, or loading, say what is wrong
    message = f"the training data is not what {folder} was made with: {'; '.join(differences)}"
    if fixes:
        message += " (--sample-order megatron depends on how many samples the run takes in all)"
    else:
        advice = "give the data and the flags that differ as in that run"
        fixes = [{"allow_data_change": True}, advice]
    yield Finding(message, *fixes, also=("split", "global_batch_size", "train_iters"))


def _data_differences(config: RunConfig, world_size: int, state: dict) -> list[str]:
    """How the data of the run differs from that of the checkpoint with this state.json."""
    done = (state["iteration"], state["consumed_samples"])
    end = max(iterations(config, world_size), done[0])
    now = data_state(
        config.data,
        config.model,
        config.training.seed,
        num_samples=batch_sizes(config, world_size).consumed_after(end, since=done),
        bert=config.bert,
    )
    return DataState.from_json(state["data"]).differences(now)


def _same_samples(
    config: RunConfig, world_size: int, state: dict, made_with: RunConfig
) -> list[dict[str, Any]]:
    """Where other batches than the checkpoint's are why the order of the samples differs: what
    keeps that order. Else empty."""
    done = (state["iteration"], state["consumed_samples"])
    sizes = batch_sizes(config, world_size)
    if sizes.consumed_after(done[0]) == done[1]:
        return []
    before = batch_sizes(made_with, world_size)
    samples = before.consumed_after(iterations(made_with, world_size), since=done)
    length = {"train_iters": sizes.iterations_within(samples, since=done)}
    for key in ("train_samples", "train_tokens"):
        if getattr(config.training, key) is not None:
            length[key] = None
    batches = {"global_batch_size": before.final}
    if before.words != sizes.words:
        batches["rampup_batch_size"] = before.words
    fixes = []
    for fix in (length, batches):
        if not _data_differences(with_values(config, fix), world_size, state):
            fixes.append(fix)
    return fixes


def optimizer_is_the_checkpoints(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """The optimizer is the one whose state the checkpoint holds, or starts from scratch."""
    c = config.checkpoint
    folder, made_with = checkpoint_to_load(config)
    if made_with is None or c.finetune or c.no_load_optim:
        return
    try:
        state = read_state_file(folder)
    except CheckpointError:
        return  # loading says what is wrong
    here = config.optimizer.optimizer
    there = state.get("optimizer", here)
    converted = state.get("converted_from")
    if there is None and converted:
        yield Finding(
            f"{folder} holds weights alone (converted from {converted}), which --load cannot "
            "resume from",
            "--pretrained-checkpoint in place of --load",
            {"finetune": True},
        )
    elif there is None:
        yield Finding(
            f"{folder} was saved with --no-save-optim: it holds no state of the optimizer",
            {"no_load_optim": True},
        )
    elif there != here:
        fixes = [{"no_load_optim": True}]
        if there in options()["optimizer"].choices:  # a later version may have others
            fixes.insert(0, {"optimizer": there} | _settings_of_update_rules(config, made_with))
        message = f"{folder} holds the state of --optimizer {there}, this run uses {here}"
        yield Finding(message, *fixes, also=("no_load_optim",))


def _settings_of_update_rules(config: RunConfig, made_with: RunConfig) -> dict[str, Any]:
    """What differs of the fields that some optimizers alone have, with the checkpoint's values."""
    found = {}
    for keys, other, _ in NEEDS_VALUE:
        for key in keys if other == "optimizer" else ():
            there = getattr(made_with.optimizer, key)
            if there != getattr(config.optimizer, key):
                found[key] = there
    return found


def rule_of_changes(given: Collection[str]) -> Rule:
    """The rule that what a run has by default, and not because it was given, is the checkpoint's.

    given: keys of the fields that the command line or its file names.
    """

    def changes_are_asked_for(config: RunConfig, world_size: int) -> Iterator[Finding]:
        c = config.checkpoint
        folder, made_with = checkpoint_to_load(config)
        if made_with is None or c.finetune:
            return
        forgotten = {}
        for key in _watched():
            if key == "optimizer" and not c.no_load_optim:
                continue  # optimizer_is_the_checkpoints
            asked = {key, *ALTERNATIVES.get(key, ())}
            there = getattr(getattr(made_with, options()[key].section), key)
            chosen = there is not None and not _follows(made_with, key, world_size)
            if asked.isdisjoint(given) and chosen and there != _value(config, key, world_size):
                forgotten[key] = there
        idle = _without_effect(with_values(config, forgotten), world_size)
        for key, there in forgotten.items():
            if key in idle:
                continue  # as --min-lr with the --lr-decay-style constant of this run
            here = _value(config, key, world_size)
            if here is None:
                instead = "without it"
                change = f"`{key}: null` in the file of --config"
            else:
                change = options()[key].setting(here)
                instead = f"with {change}"
            yield Finding(
                f"{folder} was made with {options()[key].setting(there)}; this run does not give "
                f"{flag_of(key)}, and would go on {instead}",
                {other: forgotten[other] for other in _group_of(key) if other in forgotten},
                f"{change} where the change is meant",
            )

    return changes_are_asked_for


def _watched() -> list[str]:
    """Keys of the fields that the rule compares."""
    found = list(BESIDE_OPTIMIZER)
    for key, option in options().items():
        of_optimizer = option.section == "optimizer" and option.field.changes_numbers
        if of_optimizer and key not in FOLLOWS:
            found.append(key)
    return found


def _value(config: RunConfig, key: str, world_size: int) -> Any:
    """The value that a run would have."""
    if key == "precision":
        return config.optimizer.chosen_precision
    if key == "global_batch_size":
        return global_batch(config, world_size)
    if key == "min_lr":
        return config.optimizer.lowest_lr
    if key == "lr_decay_iters" and config.optimizer.lr_decay_iters is None:
        return iterations(config, world_size)
    return getattr(getattr(config, options()[key].section), key)


def _follows(made_with: RunConfig, key: str, world_size: int) -> bool:
    """Whether the value of a checkpoint is what the others give where the field is unset."""
    o = made_with.optimizer
    if key == "min_lr":
        return o.min_lr == replace(o, min_lr=None).lowest_lr
    return key == "lr_decay_iters" and o.lr_decay_iters == iterations(made_with, world_size)


def _group_of(key: str) -> tuple[str, ...]:
    """The fields that are given together with this one."""
    return next((group for group in TOGETHER if key in group), (key,))


def _without_effect(config: RunConfig, world_size: int) -> set[str]:
    """Keys of the fields that change nothing."""
    found = set()
    for finding in nothing_is_ignored(config, world_size):
        found.update(finding.keys[:1])  # that of the flag at the beginning of the message
    return found


RESUME_RULES: tuple[Rule, ...] = (
    checkpoint_fits_model,
    data_is_the_checkpoints,
    optimizer_is_the_checkpoints,
)
"""Those that need not know what was given."""
