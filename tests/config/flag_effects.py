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
PRESET_SHAPES = {
    "gpt2": [(12, 768), (24, 1024), (36, 1280), (48, 1600)],
    "bert-base": [(12, 768), (24, 1024)],
    "megatron-bert-1.3b": [(24, 2048), (48, 2560)],
}
"""Layers and hidden size, as the papers have them."""
MORE_PIECES = "../more_text_document"
LONGER = dict(train_iters=8, hidden_dropout=0.1)
"""A run that ../trained was saved by, at iterations 2 and 4; ../trained-with-streams too, under the
other scheme."""
RESUMED = {**LONGER, "load": "../trained"}
STREAMS = {"rng_scheme": "megatron"}
TENSORS = {"tensor_model_parallel_size": 2}
STAGES = {"pipeline_model_parallel_size": 2}
WARMED_UP = (0.025, 0.05, 0.0275, 0.005)
"""Two iterations up to 0.05, then half a cosine of two iterations down to a tenth of it."""


def half_cosine(high: float, low: float) -> tuple[float, ...]:
    """The rates of the 4 iterations of BASE."""
    return tuple(low + (high - low) * (1 + cos(pi * i / 4)) / 2 for i in (1, 2, 3, 4))
