"""Values that would be silently ignored. Imports no torch."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from megalite.config.options import options_of
from megalite.config.rules.finding import Finding, example_of
from megalite.config.run import RunConfig, keys_where, options, to_flat
from megalite.data.bert_config import BertDataConfig
from megalite.data.config import NO_SPECIAL_TEXTS, TOKENIZER_FILES


@dataclass(frozen=True)
class Effect:
    """Fields that do something only where a condition holds."""

    keys: tuple[str, ...]
    works: Callable[[RunConfig], bool]
    """The condition."""
    otherwise: str
    """What is said where it does not hold, after "has no effect ..."."""
    remedy: dict[str, Any] | str = ""
    """What makes it hold, if anything does."""


NEEDS_EOD = keys_where(lambda field: field.needs_eod)

EFFECTS = (
    # parallel
    Effect(
        ("pipeline_schedule",),
        works=lambda c: c.parallel.pipeline_model_parallel_size > 1,
        otherwise="with one pipeline stage",
        remedy={"pipeline_model_parallel_size": 2},
    ),
    Effect(
        ("hang_timeout",),
        works=lambda c: c.parallel.hang_timeout < 60 * c.parallel.distributed_timeout_minutes,
        otherwise="since --distributed-timeout-minutes ends the run earlier",
        remedy={"distributed_timeout_minutes": 60.0},
    ),
    Effect(
        ("overlap_param_gather",),
        works=lambda c: c.parallel.use_distributed_optimizer,
        otherwise="without --use-distributed-optimizer",
        remedy={"use_distributed_optimizer": True},
    ),
    Effect(
        ("ddp_bucket_size",),
        works=lambda c: c.parallel.overlap_grad_reduce or c.parallel.use_distributed_optimizer,
        otherwise="without --overlap-grad-reduce or --use-distributed-optimizer",
        remedy={"overlap_grad_reduce": True},
    ),
    # model and recompute
    Effect(
        ("rotary_base",),
        works=lambda c: c.model.position_embedding_type == "rope",
        otherwise="without --position-embedding-type rope",
        remedy={"position_embedding_type": "rope"},
    ),
    Effect(
        ("gelu",),
        works=lambda c: c.is_bert or not c.model.swiglu,
        otherwise="with --swiglu",
        remedy={"swiglu": False},
    ),
    Effect(
        ("recompute_method", "recompute_num_layers"),
        works=lambda c: "full" in (c.recompute.granularity, c.recompute.recompute_granularity),
        otherwise="without --recompute-granularity full",
        remedy={"recompute_granularity": "full"},
    ),
    # optimizer
    Effect(
        ("sgd_momentum",),
        works=lambda c: c.optimizer.optimizer == "sgd",
        otherwise="without --optimizer sgd",
        remedy={"optimizer": "sgd"},
    ),
    Effect(
        ("adam_beta1", "adam_beta2", "adam_eps"),
        works=lambda c: c.optimizer.optimizer == "adam",
        otherwise="without --optimizer adam",
        remedy={"optimizer": "adam"},
    ),
    Effect(
        ("min_lr", "lr_decay_iters"),
        works=lambda c: c.optimizer.lr_decay_style != "constant",
        otherwise="with --lr-decay-style constant",
        remedy={"lr_decay_style": "cosine"},
    ),
    Effect(
        ("lr_decay_iters",),
        works=lambda c: c.optimizer.lr_decay_style != "inverse-square-root",
        otherwise="with --lr-decay-style inverse-square-root, which has no end",
        remedy={"lr_decay_style": "cosine"},
    ),
    Effect(
        ("lr_wsd_decay_style", "lr_wsd_decay_iters"),
        works=lambda c: c.optimizer.lr_decay_style == "WSD",
        otherwise="without --lr-decay-style WSD",
        remedy={"lr_decay_style": "WSD"},
    ),
    Effect(
        ("lr_warmup_init",),
        works=lambda c: c.optimizer.lr_warmup_iters > 0 or bool(c.optimizer.lr_warmup_fraction),
        otherwise="without a warm-up",
        remedy={"lr_warmup_iters": 10},
    ),
    Effect(
        ("start_weight_decay", "end_weight_decay"),
        works=lambda c: c.optimizer.weight_decay_incr_style != "constant",
        otherwise="with --weight-decay-incr-style constant",
        remedy={"weight_decay_incr_style": "linear"},
    ),
    Effect(
        ("weight_decay",),
        works=lambda c: c.optimizer.weight_decay_incr_style == "constant",
        otherwise="with --weight-decay-incr-style linear or cosine",
        remedy={"weight_decay_incr_style": "constant"},
    ),
    Effect(
        ("loss_scale", "initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis"),
        works=lambda c: c.optimizer.chosen_precision == "fp16",
        otherwise="without --fp16",
        remedy={"fp16": True},
    ),
    Effect(
        ("initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis"),
        works=lambda c: c.optimizer.loss_scale is None,
        otherwise="with a constant --loss-scale",
        remedy={"loss_scale": None},
    ),
    # training
    Effect(
        ("wandb_exp_name",),
        works=lambda c: c.training.wandb_project is not None,
        otherwise="without --wandb-project",
        remedy="--wandb-project PROJECT",
    ),
    Effect(
        ("profile_dir", "profile_ranks"),
        works=lambda c: c.training.profile is not None,
        otherwise="without --profile",
        remedy={"profile": "10-12"},
    ),
    Effect(
        ("rng_scheme",),
        works=lambda c: c.model.attention_dropout > 0 or c.model.hidden_dropout > 0,
        otherwise="without dropout",
        remedy={"hidden_dropout": 0.1},
    ),
    Effect(
        ("eval_interval",),
        works=lambda c: c.training.eval_iters > 0 or c.training.eval_interval == 0,
        otherwise="with --eval-iters 0",
        remedy=example_of("eval_iters"),
    ),
    Effect(
        ("eval_iters",),
        works=lambda c: c.training.eval_interval > 0 or c.training.eval_iters == 0,
        otherwise="with --eval-interval 0",
        remedy=example_of("eval_interval"),
    ),
    # checkpoint
    Effect(
        ("save_interval", "keep_last"),
        works=lambda c: c.checkpoint.save is not None,
        otherwise="without --save",
        remedy="--save FOLDER",
    ),
    Effect(
        ("ckpt_step", "finetune", "no_load_optim", "no_load_rng", "allow_data_change"),
        works=lambda c: c.checkpoint.load is not None,
        otherwise="without --load",
        remedy="--load FOLDER",
    ),
    Effect(
        ("no_load_optim", "no_load_rng", "allow_data_change"),
        works=lambda c: not c.checkpoint.finetune,
        otherwise="with --finetune, which loads the weights alone",
    ),
    Effect(
        ("no_load_rng",),
        works=lambda c: c.training.rng_scheme == "megatron" or c.checkpoint.load is None,
        otherwise="with --rng-scheme global, which has no random state",
        remedy={"rng_scheme": "megatron"},
    ),
    # architecture
    Effect(tuple(options_of(BertDataConfig)), works=lambda c: c.is_bert, otherwise="for a GPT"),
    Effect(
        (*NEEDS_EOD, "sample_order"),
        works=lambda c: not c.is_bert,
        otherwise="for a BERT, whose samples are made of sentences",
    ),
    # data
    Effect(
        ("tiktoken_pattern",),
        works=lambda c: c.data.tokenizer_type == "TikTokenizer",
        otherwise="without --tokenizer-type TikTokenizer",
        remedy="--tokenizer-type TikTokenizer and its file",
    ),
    Effect(
        ("parse_special_tokens",),
        works=lambda c: c.data.tokenizer_type not in (None, *NO_SPECIAL_TEXTS),
        otherwise="without a --tokenizer-type whose special tokens a text can contain",
        remedy="--tokenizer-type of the data, and its files",
    ),
    Effect(
        NEEDS_EOD,
        works=lambda c: c.data.tokenizer_type is not None or c.is_bert,
        otherwise="without a tokenizer that defines which token ends a document",
        remedy="--tokenizer-type of the data, and its files",
    ),
    Effect(
        NEEDS_EOD,
        works=lambda c: not c.data.mock_data or c.is_bert,
        otherwise="with --mock-data, which has no documents",
    ),
    Effect(
        ("reset_position_ids",),
        works=lambda c: c.model.position_embedding_type != "none",
        otherwise="with --position-embedding-type none",
        remedy={"position_embedding_type": "learned_absolute"},
    ),
    Effect(
        ("data_path", "split"),
        works=lambda c: c.data.mock_data or not (c.data.train_data_path and c.data.valid_data_path),
        otherwise="with --train-data-path and --valid-data-path, which name all that is read",
    ),
    Effect(
        ("valid_data_path",),
        works=lambda c: (
            c.data.mock_data or (c.training.eval_interval > 0 and c.training.eval_iters > 0)
        ),
        otherwise="without evaluation",
        remedy=example_of("eval_interval") | example_of("eval_iters"),
    ),
    Effect(
        ("sample_order",),
        works=lambda c: not c.data.mock_data or c.is_bert,
        otherwise="with --mock-data",
    ),
    Effect(
        ("split",),
        works=lambda c: not c.data.mock_data,
        otherwise="with --mock-data, which is generated for each split",
    ),
)


def _tokenizer_effects() -> list[Effect]:
    """Files of the tokenizer work with the kinds that are made of them."""
    kinds_of = {}
    for kind, files in TOKENIZER_FILES.items():
        for key in files:
            kinds_of.setdefault(key, []).append(kind)
    effects = []
    for key, kinds in kinds_of.items():
        simplest = min(kinds, key=lambda kind: len(TOKENIZER_FILES[kind]))
        effect = Effect(
            (key,),
            works=lambda c, kinds=kinds: c.data.tokenizer_type in kinds,
            otherwise=f"without a --tokenizer-type that reads it ({', '.join(kinds)})",
            remedy={"tokenizer_type": simplest},
        )
        effects.append(effect)
    return effects


def nothing_is_ignored(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """Fields that were changed from their defaults where they change nothing."""
    flat = to_flat(config)
    for effect in (*EFFECTS, *_tokenizer_effects()):
        if effect.works(config):
            continue
        for key in effect.keys:
            option = options()[key]
            if flat[key] == option.default:
                continue
            remedies = [effect.remedy] if effect.remedy else []
            others = effect.remedy if isinstance(effect.remedy, dict) else ()
            yield Finding(
                f"{option.setting(flat[key])} has no effect {effect.otherwise}",
                (key, *others),
                (*remedies, {key: option.default}),
            )
