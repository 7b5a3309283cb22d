"""One entry of test_flags: a value of a flag and its checks, and the configurations to start
from."""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import cos, pi
from typing import Any

from tests import runs
from tests.checks import Check
from tests.runs import Bench


@dataclass(frozen=True)
class Effect:
    """One value of a flag, and what it does."""

    value: Any
    checks: tuple[Check, ...]
    base: dict = field(default_factory=dict)
    """Flags of both runs, beside BASE."""
    also: dict = field(default_factory=dict)
    """Flags that go with the value, of the second run only."""
    ranks: int = 1
    observe: Callable[[Bench, dict, int], Any] = runs.training


def effect(value: Any, *checks: Check, **rest) -> Effect:
    """An effect that is seen in a training run, or as `observe` says."""
    return Effect(value, checks, **rest)


def dry(value: Any, *checks: Check, base: dict | None = None, **rest) -> Effect:
    """An effect that is seen in a dry run."""
    return Effect(value, checks, base={"dry_run": True, **(base or {})}, **rest)


LAYERS, HIDDEN, VOCABULARY = 2, 16, 61
BASE = dict(
    num_layers=LAYERS,
    hidden_size=HIDDEN,
    num_attention_heads=4,
    seq_length=16,
    vocab_size=VOCABULARY,
    init_method_std=0.1,
    attention_dropout=0.0,
    hidden_dropout=0.0,
    mock_data=True,
    global_batch_size=4,
    train_iters=4,
    lr=0.05,
    eval_interval=2,
    eval_iters=1,
    log_interval=1,
    metrics_file="metrics.jsonl",
    device="cpu",
)
ROPE = {"position_embedding_type": "rope"}
SCALED_ROPE = {**ROPE, "rope_scaling": "llama3", "rope_original_max_position_embeddings": 16}
DEEP = {"num_layers": 4, "attention_dropout": 0.1}
FULL = {**DEEP, "recompute_granularity": "full"}
SGD = {"optimizer": "sgd"}
SAVES = {"save": "saved"}
REAL = dict(
    mock_data=False,
    vocab_size=None,
    data_path="../bytes_text_document",
    tokenizer_type="ByteTokenizer",
)
PIECES = dict(
    data_path="../pieces_text_document",
    tokenizer_type="SentencePieceTokenizer",
    tokenizer_model="../pieces.model",
)
MEGATRON = {**REAL, "sample_order": "megatron"}
PLAIN = REAL | {"data_path": "../plain"}
"""Numbers that any tokenizer might have made; bytes are 257 entries."""
BPE = dict(
    tokenizer_type="GPT2BPETokenizer", vocab_file="../vocab.json", merge_file="../merges.txt"
)
CASED = dict(tokenizer_type="BertWordPieceCase", vocab_file="../cased.txt")
BERT = {"architecture": "bert"}
GPT2_FAMILY = {"seq_length": 1024, "architecture": "gpt"}
MEGATRON_FAMILY = {"architecture": "bert", "norm_placement": "pre"}
LLAMA_3 = {"vocab_size": 128256, "rotary_base": 5e5, "rope_scaling": "none"}
SMOLLM2 = {"vocab_size": 49152, "untie_embeddings_and_output_weights": False}
BERT_FAMILY = {"architecture": "bert", "norm_placement": "post", "gelu": "erf"}
LLAMA_31 = {"rope_scaling": "llama3", "rope_scaling_factor": 8.0, "vocab_size": 128256}
LLAMA_32 = LLAMA_31 | {"rope_scaling_factor": 32.0}
QWEN2 = {"add_qkv_bias": True, "disable_bias_linear": True, "rotary_base": 1e6}
QWEN3 = {"qk_layernorm": True, "kv_channels": 128, "norm_epsilon": 1e-6}
PRESET_SHAPES = {
    "gpt2": (12, 768, GPT2_FAMILY),
    "gpt2-medium": (24, 1024, GPT2_FAMILY),
    "gpt2-large": (36, 1280, GPT2_FAMILY),
    "gpt2-xl": (48, 1600, GPT2_FAMILY),
    "bert-base": (12, 768, BERT_FAMILY),
    "bert-large": (24, 1024, BERT_FAMILY),
    "megatron-bert-1.3b": (24, 2048, MEGATRON_FAMILY),
    "megatron-bert-3.9b": (48, 2560, MEGATRON_FAMILY),
    "llama-2-7b": (32, 4096, dict(vocab_size=32000, norm_epsilon=1e-5)),
    "llama-2-13b": (40, 5120, dict(vocab_size=32000, norm_epsilon=1e-5)),
    "llama-2-70b": (80, 8192, dict(vocab_size=32000, norm_epsilon=1e-5)),
    "llama-3-8b": (32, 4096, LLAMA_3),
    "llama-3-70b": (80, 8192, LLAMA_3),
    "llama-3.1-8b": (32, 4096, LLAMA_31),
    "llama-3.1-70b": (80, 8192, LLAMA_31),
    "llama-3.1-405b": (126, 16384, LLAMA_31),
    "llama-3.2-1b": (16, 2048, LLAMA_32),
    "llama-3.2-3b": (28, 3072, LLAMA_32),
    "mistral-7b-v0.1": (32, 4096, dict(vocab_size=32000, max_position_embeddings=4096)),
    "mistral-7b-v0.3": (32, 4096, dict(vocab_size=32768, max_position_embeddings=32768)),
    "qwen2-0.5b": (24, 896, QWEN2),
    "qwen2-1.5b": (28, 1536, QWEN2),
    "qwen2-7b": (28, 3584, QWEN2),
    "qwen2-72b": (80, 8192, QWEN2),
    "qwen2.5-0.5b": (24, 896, QWEN2),
    "qwen2.5-1.5b": (28, 1536, QWEN2),
    "qwen2.5-3b": (36, 2048, QWEN2),
    "qwen2.5-7b": (28, 3584, QWEN2),
    "qwen2.5-14b": (48, 5120, QWEN2),
    "qwen2.5-32b": (64, 5120, QWEN2),
    "qwen2.5-72b": (80, 8192, QWEN2),
    "qwen3-0.6b": (28, 1024, QWEN3),
    "qwen3-1.7b": (28, 2048, QWEN3),
    "qwen3-4b": (36, 2560, QWEN3),
    "qwen3-8b": (36, 4096, QWEN3),
    "qwen3-14b": (40, 5120, QWEN3),
    "qwen3-32b": (64, 5120, QWEN3),
    "smollm2-135m": (30, 576, SMOLLM2),
    "smollm2-360m": (32, 960, SMOLLM2),
    "smollm2-1.7b": (24, 2048, SMOLLM2),
}
"""Layers, hidden size and some of the family, as published."""
MORE_PIECES = "../more_text_document"
LONGER = dict(train_iters=8, hidden_dropout=0.1)
"""A run that ../trained was saved by, at iterations 2 and 4; ../trained-with-streams too, under the
other scheme. A bit of a weight in ../damaged's last one differs."""
RESUMED = {**LONGER, "load": "../trained"}
STREAMS = {"rng_scheme": "megatron"}
TENSORS = {"tensor_model_parallel_size": 2}
STAGES = {"pipeline_model_parallel_size": 2}
WARMED_UP = (0.025, 0.05, 0.0275, 0.005)
"""Two iterations up to 0.05, then half a cosine of two iterations down to a tenth of it."""


def half_cosine(high: float, low: float) -> tuple[float, ...]:
    """The rates of the 4 iterations of BASE."""
    return tuple(low + (high - low) * (1 + cos(pi * i / 4)) / 2 for i in (1, 2, 3, 4))
