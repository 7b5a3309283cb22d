"""Values that make no sense on their own, and values that would be silently ignored. Imports no torch."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from megalite.config.rules.finding import EXAMPLES, Finding
from megalite.config.run import Problem, RunConfig, options, to_flat
from megalite.data.config import NO_SPECIAL_TEXTS, TOKENIZER_FILES

MAY_BE_ZERO = {"lr_warmup_iters", "eval_interval", "eval_iters", "seed", "ckpt_step"}
"""Whole numbers from 0; all others start at 1."""
BELOW_ONE = {
    "attention_dropout",
    "hidden_dropout",
    "adam_beta1",
    "adam_beta2",
    "sgd_momentum",
    "lr_warmup_fraction",
}
"""Numbers in [0, 1)."""
FROM_ZERO = {"hang_timeout", "min_lr", "weight_decay", "clip_grad", "short_seq_prob"}
"""Numbers that may be 0; all others are above it."""
UP_TO_ONE = {"mask_prob", "short_seq_prob"}
"""Numbers of at most 1."""


def out_of_range(config: RunConfig) -> list[Problem]:
    """Problems of single numbers, whatever the other fields say."""
    problems = []
    for key, value in to_flat(config).items():
        option = options()[key]
        if value == "":
            problems.append(
                Problem(
                    f"{option.flag} is empty", f"leave out {option.flag}, or give a value", (key,)
                )
            )
        if option.kind not in (int, float) or value is None:
            continue
        if option.kind is int:
            least = 0 if key in MAY_BE_ZERO else 1
            sound, bounds = least <= value < 2**63, f"a whole number from {least}"
        elif key in BELOW_ONE:
            sound, bounds = 0 <= value < 1, "at least 0 and below 1"
        else:
            least = "at least 0" if key in FROM_ZERO else "above 0"
            most = "at most 1" if key in UP_TO_ONE else "finite"
            sound = (value >= 0 if key in FROM_ZERO else value > 0) and math.isfinite(value)
            sound, bounds = sound and not (key in UP_TO_ONE and value > 1), f"{least} and {most}"
        if not sound:
            usual = EXAMPLES.get(key, option.default)
            problems.append(
                Problem(f"{option.flag} {value} must be {bounds}", option.setting(usual), (key,))
            )
    return problems


@dataclass(frozen=True)
class _Effect:
    """Fields that do something only where a condition holds."""

    keys: tuple[str, ...]
    works: Callable[[RunConfig], bool]
    condition: str
    """The condition, after "has no effect ..."."""
    remedy: dict[str, Any] | str
    """What makes it hold."""


EFFECTS = (
    _Effect(
        ("pipeline_schedule",),
        lambda c: c.parallel.pipeline_model_parallel_size > 1,
        "with one pipeline stage",
        {"pipeline_model_parallel_size": 2},
    ),
    _Effect(
        ("no_load_optim", "no_load_rng", "allow_data_change"),
        lambda c: not c.checkpoint.finetune,
        "with --finetune, which loads the weights alone",
        "",
    ),
    _Effect(
        ("hang_timeout",),
        lambda c: c.parallel.hang_timeout < 60 * c.parallel.distributed_timeout_minutes,
        "since --distributed-timeout-minutes ends the run earlier",
        {"distributed_timeout_minutes": 60.0},
    ),
    _Effect(
        ("rotary_base",),
        lambda c: c.model.position_embedding_type == "rope",
        "without --position-embedding-type rope",
        {"position_embedding_type": "rope"},
    ),
    _Effect(
        ("recompute_method", "recompute_num_layers"),
        lambda c: c.recompute.granularity == "full" or c.recompute.recompute_granularity == "full",
        "without --recompute-granularity full",
        {"recompute_granularity": "full"},
    ),
    _Effect(
        ("sgd_momentum",),
        lambda c: c.optimizer.optimizer == "sgd",
        "without --optimizer sgd",
        {"optimizer": "sgd"},
    ),
    _Effect(
        ("adam_beta1", "adam_beta2", "adam_eps"),
        lambda c: c.optimizer.optimizer == "adam",
        "without --optimizer adam",
        {"optimizer": "adam"},
    ),
    _Effect(
        ("min_lr", "lr_decay_iters"),
        lambda c: c.optimizer.lr_decay_style != "constant",
        "with --lr-decay-style constant",
        {"lr_decay_style": "cosine"},
    ),
    _Effect(
        ("wandb_exp_name",),
        lambda c: c.training.wandb_project is not None,
        "without --wandb-project",
        "--wandb-project PROJECT",
    ),
    _Effect(
        ("profile_dir", "profile_ranks"),
        lambda c: c.training.profile is not None,
        "without --profile",
        {"profile": "10-12"},
    ),
    _Effect(
        ("save_interval", "keep_last"),
        lambda c: c.checkpoint.save is not None,
        "without --save",
        "--save FOLDER",
    ),
    _Effect(
        ("ckpt_step", "finetune", "no_load_optim", "no_load_rng", "allow_data_change"),
        lambda c: c.checkpoint.load is not None,
        "without --load",
        "--load FOLDER",
    ),
    _Effect(
        ("no_load_rng",),
        lambda c: c.training.rng_scheme == "megatron" or c.checkpoint.load is None,
        "with --rng-scheme global, which has no random state",
        {"rng_scheme": "megatron"},
    ),
    _Effect(
        ("rng_scheme",),
        lambda c: c.model.attention_dropout > 0 or c.model.hidden_dropout > 0,
        "without dropout",
        {"hidden_dropout": 0.1},
    ),
    _Effect(
        ("mask_prob", "short_seq_prob", "bert_pair", "whole_word_mask", "max_ngrams"),
        lambda c: c.is_bert,
        "for a GPT",
        "",
    ),
    _Effect(
        ("eod_mask_loss", "reset_position_ids", "reset_attention_mask", "sample_order"),
        lambda c: not c.is_bert,
        "for a BERT, whose samples are made of sentences",
        "",
    ),
    _Effect(
        ("gelu",), lambda c: c.is_bert or not c.model.swiglu, "with --swiglu", {"swiglu": False}
    ),
    *(
        _Effect(
            (field,),
            lambda c, field=field: field in TOKENIZER_FILES.get(c.data.tokenizer_type, ()),
            "without a --tokenizer-type that reads it "
            f"({', '.join(kind for kind, files in TOKENIZER_FILES.items() if field in files)})",
            {"tokenizer_type": kind},
        )
        for field, kind in (
            ("tokenizer_model", "SentencePieceTokenizer"),
            ("vocab_file", "BertWordPieceLowerCase"),
            ("merge_file", "GPT2BPETokenizer"),
        )
    ),
    _Effect(
        ("tiktoken_pattern",),
        lambda c: c.data.tokenizer_type == "TikTokenizer",
        "without --tokenizer-type TikTokenizer",
        "--tokenizer-type TikTokenizer and its file",
    ),
    _Effect(
        ("parse_special_tokens",),
        lambda c: c.data.tokenizer_type not in (None, *NO_SPECIAL_TEXTS),
        "without a --tokenizer-type whose special tokens a text can contain",
        "--tokenizer-type of the data, and its files",
    ),
    _Effect(
        ("eod_mask_loss", "reset_position_ids", "reset_attention_mask"),
        lambda c: c.data.tokenizer_type is not None or c.is_bert,
        "without a tokenizer that tells which token ends a document",
        "--tokenizer-type of the data, and its files",
    ),
    _Effect(
        ("data_path", "split"),
        lambda c: c.data.mock_data or not (c.data.train_data_path and c.data.valid_data_path),
        "with --train-data-path and --valid-data-path, which name all that is read",
        "",
    ),
    _Effect(
        ("valid_data_path",),
        lambda c: c.data.mock_data or (c.training.eval_interval > 0 and c.training.eval_iters > 0),
        "without evaluation",
        {"eval_interval": 1000, "eval_iters": 100},
    ),
    _Effect(("sample_order",), lambda c: not c.data.mock_data or c.is_bert, "with --mock-data", ""),
    _Effect(
        ("eod_mask_loss", "reset_position_ids", "reset_attention_mask"),
        lambda c: not c.data.mock_data or c.is_bert,
        "with --mock-data, which has no documents",
        "",
    ),
    _Effect(
        ("split",),
        lambda c: not c.data.mock_data,
        "with --mock-data, which is made for each split",
        "",
    ),
    _Effect(
        ("reset_position_ids",),
        lambda c: c.model.position_embedding_type != "none",
        "with --position-embedding-type none",
        {"position_embedding_type": "learned_absolute"},
    ),
    _Effect(
        ("eval_interval",),
        lambda c: c.training.eval_iters > 0 or c.training.eval_interval == 0,
        "with --eval-iters 0",
        {"eval_iters": 100},
    ),
    _Effect(
        ("eval_iters",),
        lambda c: c.training.eval_interval > 0 or c.training.eval_iters == 0,
        "with --eval-interval 0",
        {"eval_interval": 1000},
    ),
)


def nothing_is_ignored(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """Fields that were changed from their defaults where they change nothing."""
    flat = to_flat(config)
    for effect in EFFECTS:
        for key in effect.keys:
            idle = flat[key] != options()[key].default and not effect.works(config)
            if idle:
                shown = options()[key].setting(flat[key])
                drop = {key: options()[key].default}
                yield Finding(
                    f"{shown} has no effect {effect.condition}",
                    (key, *(effect.remedy if isinstance(effect.remedy, dict) else ())),
                    (*([effect.remedy] if effect.remedy else []), drop),
                )
