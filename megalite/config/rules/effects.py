"""Values that would be silently ignored. Imports no torch."""

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from megalite.config.options import options_of
from megalite.config.rules.disk import same_place
from megalite.config.rules.finding import Finding, example_of, parameter_names, wanted_splits
from megalite.config.run import RunConfig, keys_where, options, to_flat
from megalite.convert.keys import ROPE_FIELDS
from megalite.data.bert_config import BertDataConfig
from megalite.data.config import NO_SPECIAL_TEXTS, TOKENIZER_FILES
from megalite.models.shapes import decays
from megalite.optim.config import OptimizerConfig
from megalite.optim.treatment import treatment_of
from megalite.parallel.config import OF_SPLIT

NEEDS_EOD = keys_where(lambda field: field.needs_eod)
IDLE_FOR = {
    "gpt": (tuple(options_of(BertDataConfig)), "for a GPT"),
    "bert": ((*NEEDS_EOD, "sample_order"), "for a BERT, whose samples are made of sentences"),
}
"""Fields that do nothing for an architecture, and what is said of them."""
ADAPTS_LOSS_SCALE = ("initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis")
ADAM = ("adam_beta1", "adam_beta2", "adam_eps", "optimizer_backend")
MUON = tuple(key for key in options_of(OptimizerConfig) if key.startswith("muon_"))
NEEDS_VALUE = (
    (("rotary_base", "rope_scaling"), "position_embedding_type", ("rope",)),
    (tuple(ROPE_FIELDS.values()), "rope_scaling", ("llama3",)),
    (("sgd_momentum",), "optimizer", ("sgd",)),
    (ADAM, "optimizer", ("adam", "muon")),
    (("lion_beta1", "lion_beta2"), "optimizer", ("lion",)),
    (MUON, "optimizer", ("muon",)),
    (
        ("lr_wsd_decay_style", "lr_wsd_decay_iters", "lr_wsd_decay_samples"),
        "lr_decay_style",
        ("WSD",),
    ),
)
"""(fields, another field, the values of it without which they do nothing)."""
NEEDS_ANY = (
    (("wandb_exp_name",), "wandb_project", "--wandb-project PROJECT"),
    (("decoupled_min_lr",), "decoupled_lr", {"decoupled_lr": 1e-4}),
    (("profile_dir", "profile_ranks"), "profile", {"profile": "10-12"}),
    (("trace_iterations",), "trace", "--trace FOLDER"),
    (("save_interval", "keep_last", "keep_every", "async_save"), "save", "--save FOLDER"),
    (("no_save_optim", "no_save_rng"), "save", "--save FOLDER"),
    (("ckpt_step", "finetune", "no_load_optim", "no_load_rng"), "load", "--load FOLDER"),
    (("allow_data_change", "exit_on_missing_checkpoint"), "load", "--load FOLDER"),
)
"""(fields, another field, which must be set for them to do something, how it is set)."""

Idle = tuple[tuple[str, ...], str, dict[str, Any] | str | None]
"""Fields without an effect; what is said of them, after "has no effect ..."; what would give them
one, if anything does."""


def nothing_is_ignored(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """Fields that were changed from their defaults where they change nothing."""
    flat = to_flat(config)
    foreign, why = IDLE_FOR[config.model.architecture]
    found = [(foreign, why, None)]
    for section in (_other_values, _layout_and_model, _training, _frozen, _checkpoint, _data):
        for keys, why, fix in section(config):
            found.append(([key for key in keys if key not in foreign], why, fix))
    for keys, why, fix in found:
        for key in keys:
            option = options()[key]
            if flat[key] != option.default:
                message = f"{option.setting(flat[key])} has no effect {why}"
                fixes = [fix] if fix else []
                others = fix if isinstance(fix, dict) else ()
                yield Finding(message, *fixes, {key: option.default}, also=tuple(others))


def _other_values(config: RunConfig) -> Iterator[Idle]:
    """Fields that need one other field."""
    flat = to_flat(config)
    for keys, other, values in NEEDS_VALUE:
        if flat[other] not in values:
            why = f"without {options()[other].setting(' or '.join(values))}"
            yield keys, why, {other: values[0]}
    for keys, other, fix in NEEDS_ANY:
        if flat[other] is None:
            yield keys, f"without {options()[other].flag}", fix


def _layout_and_model(config: RunConfig) -> Iterator[Idle]:
    p = config.parallel
    m = config.model
    if p.pipeline_model_parallel_size == 1:
        fix = {"pipeline_model_parallel_size": 2}
        yield OF_SPLIT, "with one pipeline stage", fix
    if p.hang_timeout >= 60 * p.distributed_timeout_minutes:
        why = "since --distributed-timeout-minutes ends the run earlier"
        yield ("hang_timeout",), why, {"distributed_timeout_minutes": 60.0}
    if not config.deepspeed.deepspeed:
        yield ("deepspeed_config",), "without --deepspeed", {"deepspeed": True}
    if not p.use_distributed_optimizer:
        why = "without --use-distributed-optimizer"
        yield ("overlap_param_gather",), why, {"use_distributed_optimizer": True}
    if not p.overlap_grad_reduce and not p.use_distributed_optimizer:
        why = "without --overlap-grad-reduce or --use-distributed-optimizer"
        yield ("ddp_bucket_size",), why, {"overlap_grad_reduce": True}
    if m.swiglu and not config.head_cost.dense:  # a dense layer in the head has its own GELU
        yield ("gelu",), "with --swiglu", {"swiglu": False}
    if not m.disable_bias_linear:
        why = "without --disable-bias-linear: all linear layers have biases"
        yield ("add_qkv_bias",), why, {"disable_bias_linear": True}
    if m.position_embedding_type == "none":
        fix = {"position_embedding_type": "learned_absolute"}
        yield ("reset_position_ids",), "with --position-embedding-type none", fix
    if "full" not in (config.recompute.granularity, config.recompute.recompute_granularity):
        keys = ("recompute_method", "recompute_num_layers")
        fix = {"recompute_granularity": "full"}
        yield keys, "without --recompute-granularity full", fix


def _training(config: RunConfig) -> Iterator[Idle]:
    t = config.training
    o = config.optimizer
    fix = {"lr_decay_style": "cosine"}
    if o.lr_decay_style == "constant":
        keys = ("min_lr", "decoupled_min_lr", "lr_decay_iters", "lr_decay_samples")
        yield keys, "with --lr-decay-style constant", fix
    if o.lr_decay_style == "inverse-square-root":
        why = "with --lr-decay-style inverse-square-root, which has no end"
        yield ("lr_decay_iters", "lr_decay_samples"), why, fix
    if not (o.lr_warmup_iters or o.lr_warmup_samples or o.lr_warmup_fraction):
        yield ("lr_warmup_init",), "without a warm-up", {"lr_warmup_iters": 10}
    if o.weight_decay_incr_style == "constant":
        keys = ("start_weight_decay", "end_weight_decay")
        fix = {"weight_decay_incr_style": "linear"}
        yield keys, "with --weight-decay-incr-style constant", fix
    else:
        why = "with --weight-decay-incr-style linear or cosine"
        yield ("weight_decay",), why, {"weight_decay_incr_style": "constant"}
    if o.chosen_precision != "fp16":
        yield ("loss_scale", *ADAPTS_LOSS_SCALE), "without --fp16", {"fp16": True}
    if o.max_bad_steps == 0:
        why = "with --max-bad-steps 0, which skips no step"
        yield ("skip_grad_norm_above",), why, {"max_bad_steps": 10}
    if o.loss_scale is not None:
        yield ADAPTS_LOSS_SCALE, "with a constant --loss-scale", {"loss_scale": None}
    if config.model.attention_dropout <= 0 and config.model.hidden_dropout <= 0:
        yield ("rng_scheme",), "without dropout", {"hidden_dropout": 0.1}
    if t.eval_iters == 0 and t.eval_interval > 0:
        yield ("eval_interval",), "with --eval-iters 0", example_of("eval_iters")
    if t.eval_interval == 0 and t.eval_iters > 0:
        yield ("eval_iters",), "with --eval-interval 0", example_of("eval_interval")


def _frozen(config: RunConfig) -> Iterator[Idle]:
    """Settings of parameters that --parameter-groups freezes, all of them."""
    o = config.optimizer
    if o.parameter_groups is None:
        return
    treatments = []
    with suppress(ValueError):  # parameter_groups_match says it
        treatments = [treatment_of(name, decays(name), o) for name in parameter_names(config)]
    trained = [treatment for treatment in treatments if not treatment.frozen]
    if not trained:  # parameter_groups_match says it
        return
    fix = {"parameter_groups": None}
    if not any(treatment.is_decoupled for treatment in trained):
        why = "with --parameter-groups that freeze all that it is for"
        yield ("decoupled_lr", "decoupled_min_lr"), why, fix
    if o.optimizer == "muon" and "muon" not in {treatment.rule for treatment in trained}:
        why = "with --parameter-groups that freeze every matrix that Muon updates"
        yield MUON, why, fix


def _checkpoint(config: RunConfig) -> Iterator[Idle]:
    c = config.checkpoint
    if c.finetune:
        keys = ("no_load_optim", "no_load_rng", "allow_data_change")
        yield keys, "with --finetune, which loads the weights alone", None
    if c.ckpt_step is not None:
        why = "with --ckpt-step, which names the one checkpoint to load"
        yield ("load_fallback",), why, {"ckpt_step": None}
    if c.load is not None and (c.finetune or not same_place(c.load, c.save)):
        why = "with --load of another folder than --save, whose checkpoint is loaded"
        yield ("load_hf", "pretrained_checkpoint"), why, {"load": None}
    if c.load_hf is not None:
        why = "with --load-hf, which names other weights"
        yield ("pretrained_checkpoint",), why, {"load_hf": None}
    if c.load is None and c.pretrained_checkpoint is None:
        keys = ("allow_model_change", "use_checkpoint_args", "verify_checkpoint", "load_fallback")
        yield keys, "without --load or --pretrained-checkpoint", "--load FOLDER"
    if config.training.rng_scheme == "global":
        why = "with --rng-scheme global, which has no random state"
        for key, folder in (("no_load_rng", c.load), ("no_save_rng", c.save)):
            if folder is not None:
                yield (key,), why, {"rng_scheme": "megatron"}


def _data(config: RunConfig) -> Iterator[Idle]:
    d = config.data
    kind = d.tokenizer_type
    fix = "--tokenizer-type of the data, and its files"
    # The tokenizer. Its files work with the kinds that are made of them.
    for key in ("tokenizer_model", "vocab_file", "merge_file"):
        kinds = [other for other, files in TOKENIZER_FILES.items() if key in files]
        if kind not in kinds:
            simplest = min(kinds, key=lambda other: len(TOKENIZER_FILES[other]))
            why = f"without a --tokenizer-type that reads it ({', '.join(kinds)})"
            yield (key,), why, {"tokenizer_type": simplest}
    if kind != "TikTokenizer":
        why = "without --tokenizer-type TikTokenizer"
        yield ("tiktoken_pattern",), why, "--tokenizer-type TikTokenizer and its file"
    if kind in (None, *NO_SPECIAL_TEXTS):
        why = "without a --tokenizer-type whose special tokens a text can contain"
        yield ("parse_special_tokens",), why, fix
    if kind is None:
        why = "without a tokenizer that defines which token ends a document"
        yield NEEDS_EOD, why, fix
    # The datasets.
    if d.mock_data:
        yield ("split",), "with --mock-data, which is generated for each split", None
        yield NEEDS_EOD, "with --mock-data, which has no documents", None
        yield ("sample_order",), "with --mock-data", None
        return
    if d.train_data_path and d.valid_data_path:
        why = "with --train-data-path and --valid-data-path, which name all that is read"
        yield ("data_path", "split"), why, None
    if "valid" not in wanted_splits(config):
        fix = example_of("eval_interval") | example_of("eval_iters")
        yield ("valid_data_path",), "without evaluation", fix


def other_ranks_exist(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """What compares ranks, or reports what they send: the effects that depend on their number."""
    training = config.training
    if world_size > 1:
        return
    if training.check_replicas is not None:
        message = f"--check-replicas {training.check_replicas} has no effect with one rank"
        yield Finding(message, {"check_replicas": None}, {"world_size": 2})
    if training.log_communication:
        message = "--log-communication has no effect with one rank"
        yield Finding(message, {"log_communication": False}, {"world_size": 2})
