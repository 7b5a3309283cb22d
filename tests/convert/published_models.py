"""Small models of transformers with random weights, one for each thing that a config.json can say,
and the same models of megalite."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

VOCABULARY = 61
SEQUENCE = 16
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
}
GPT2_SIZES = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 32,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}
NO_IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def _make(name: str, keys: dict[str, Any]) -> torch.nn.Module:
    import transformers

    kind = getattr(transformers, name)
    return kind(kind.config_class(**keys, **NO_IDS))


MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "gpt2": partial(_make, "GPT2LMHeadModel", GPT2_SIZES),
    "gpt2, untied": partial(
        _make,
        "GPT2LMHeadModel",
        {**GPT2_SIZES, "n_inner": 40, "tie_word_embeddings": False, "activation_function": "gelu"},
    ),
    "llama 2": partial(_make, "LlamaForCausalLM", SIZES),
    "llama 3.1": partial(_make, "LlamaForCausalLM", {**GROUPED, "rope_parameters": LLAMA3}),
    "llama, tied, biases, wide heads": partial(
        _make,
        "LlamaForCausalLM",
        {
            **GROUPED,
            "tie_word_embeddings": True,
            "attention_bias": True,
            "mlp_bias": True,
            "head_dim": 12,
        },
    ),
    "mistral": partial(_make, "MistralForCausalLM", {**GROUPED, "sliding_window": 24}),
    "qwen2": partial(_make, "Qwen2ForCausalLM", GROUPED),
    "qwen3": partial(_make, "Qwen3ForCausalLM", {**GROUPED, "head_dim": 12}),
    "bert": partial(_make, "BertForPreTraining", {**SIZES, **NO_DROPOUT}),
    "bert, encoder only": partial(_make, "BertModel", {**SIZES, **NO_DROPOUT}),
    "bert, masked only": partial(
        _make, "BertForMaskedLM", {**SIZES, **NO_DROPOUT, "hidden_act": "gelu_new"}
    ),
}
"""By a name for the test."""
WHOLE = [name for name in MODELS if name != "bert, encoder only"]
"""Those that have an output layer."""


def randomize(model: torch.nn.Module, seed: int = 5) -> torch.nn.Module:
    """Give a model weights that all matter, biases and norms too: initial ones are 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            values = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.15 * values + (0.5 if parameter.dim() == 1 else 0.0))
    model.tie_weights()
    return model.eval()


def save_models(folder: Path) -> dict[str, Path]:
    """Write every model into a folder of its own, by its name."""
    folders = {}
    for number, (name, make) in enumerate(MODELS.items()):
        folders[name] = folder / str(number)
        randomize(make()).save_pretrained(folders[name])
    return folders


def tokens() -> torch.Tensor:
    """[2, s] random ids."""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(VOCABULARY, (2, SEQUENCE), generator=generator)


def their_logits(folder: Path) -> torch.Tensor:
    """[2, s, v] that transformers computes for `tokens()` from a folder; of an encoder alone its
    hidden states."""
    model = load(folder)
    with torch.no_grad():
        output = model(tokens())
    if "last_hidden_state" in output:
        return output.last_hidden_state
    return output.prediction_logits if "prediction_logits" in output else output.logits


def load(folder: Path) -> torch.nn.Module:
    """The model in a folder, by the class that its config.json names."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    return getattr(transformers, config.architectures[0]).from_pretrained(folder).eval()
