"""Shapes of published models, as flags. Imports no torch.

The sources are the papers and, where these leave something open, the config.json that is published
with the weights on Hugging Face. A sliding window is not supported: a model that has one gets
positions up to the window, within which it computes the same.
"""

from typing import Any

from megalite.nn.config import PresetName

Fields = dict[str, Any]
"""Values by field name."""


def _shape(
    layers: int, hidden: int, heads: int, groups: int | None = None, ffn: int | None = None
) -> Fields:
    """Sizes; key/value heads and the MLP's width where they are not the defaults."""
    fields = {"num_layers": layers, "hidden_size": hidden, "num_attention_heads": heads}
    if groups is not None:
        fields["num_query_groups"] = groups
    if ffn is not None:
        fields["ffn_hidden_size"] = ffn
    return fields


_GPT2 = {"architecture": "gpt", "seq_length": 1024}
_MEGATRON_BERT = {"architecture": "bert", "seq_length": 512}
_BERT = _MEGATRON_BERT | {"norm_placement": "post", "gelu": "erf", "norm_epsilon": 1e-12}
_LLAMA_2 = {
    "architecture": "gpt",
    "vocab_size": 32000,
    "seq_length": 4096,
    "max_position_embeddings": 4096,
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "swiglu": True,
    "disable_bias_linear": True,
    "untie_embeddings_and_output_weights": True,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
}
_LLAMA_3 = _LLAMA_2 | {
    "vocab_size": 128256,
    "seq_length": 8192,
    "max_position_embeddings": 8192,
    "rotary_base": 500000.0,
}
_LLAMA_31 = _LLAMA_3 | {"max_position_embeddings": 131072, "rope_scaling": "llama3"}
_TIED = {"untie_embeddings_and_output_weights": False}
_LLAMA_32 = _LLAMA_31 | _TIED | {"rope_scaling_factor": 32.0}
_MISTRAL_3 = _LLAMA_2 | {
    "vocab_size": 32768,
    "seq_length": 8192,
    "max_position_embeddings": 32768,
    "rotary_base": 1000000.0,
}
_QWEN2 = _LLAMA_2 | {
    "vocab_size": 152064,
    "max_position_embeddings": 131072,
    "rotary_base": 1000000.0,
    "norm_epsilon": 1e-6,
    "add_qkv_bias": True,
}
_WIDER_EPSILON = {"norm_epsilon": 1e-5}
_QWEN2_SMALL = _QWEN2 | _TIED | {"vocab_size": 151936}
_SHORT = {"max_position_embeddings": 32768}
_QWEN3 = _LLAMA_2 | {
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rotary_base": 1000000.0,
    "norm_epsilon": 1e-6,
    "qk_layernorm": True,
    "kv_channels": 128,
}
_SMOLLM2 = (
    _LLAMA_2
    | _TIED
    | {
        "vocab_size": 49152,
        "seq_length": 2048,
        "max_position_embeddings": 8192,
        "rotary_base": 100000.0,
    }
)

PRESETS: dict[PresetName, Fields] = {
    # Radford et al. 2019, table 2
    "gpt2": _GPT2 | _shape(12, 768, 12),
    "gpt2-medium": _GPT2 | _shape(24, 1024, 16),
    "gpt2-large": _GPT2 | _shape(36, 1280, 20),
    "gpt2-xl": _GPT2 | _shape(48, 1600, 25),
    # Devlin et al. 2018, section 3
    "bert-base": _BERT | _shape(12, 768, 12),
    "bert-large": _BERT | _shape(24, 1024, 16),
    # Shoeybi et al. 2019, table 4
    "megatron-bert-1.3b": _MEGATRON_BERT | _shape(24, 2048, 32),
    "megatron-bert-3.9b": _MEGATRON_BERT | _shape(48, 2560, 40),
    # Touvron et al. 2023; meta-llama/Llama-2-*-hf
    "llama-2-7b": _LLAMA_2 | _shape(32, 4096, 32, ffn=11008),
    "llama-2-13b": _LLAMA_2 | _shape(40, 5120, 40, ffn=13824),
    "llama-2-70b": _LLAMA_2 | _shape(80, 8192, 64, groups=8, ffn=28672),
    # Grattafiori et al. 2024, table 3; meta-llama/Meta-Llama-3-*, Llama-3.1-*, Llama-3.2-*
    "llama-3-8b": _LLAMA_3 | _shape(32, 4096, 32, groups=8, ffn=14336),
    "llama-3-70b": _LLAMA_3 | _shape(80, 8192, 64, groups=8, ffn=28672),
    "llama-3.1-8b": _LLAMA_31 | _shape(32, 4096, 32, groups=8, ffn=14336),
    "llama-3.1-70b": _LLAMA_31 | _shape(80, 8192, 64, groups=8, ffn=28672),
    "llama-3.1-405b": _LLAMA_31 | _shape(126, 16384, 128, groups=8, ffn=53248),
    "llama-3.2-1b": _LLAMA_32 | _shape(16, 2048, 32, groups=8, ffn=8192),
    "llama-3.2-3b": _LLAMA_32 | _shape(28, 3072, 24, groups=8, ffn=8192),
    # Jiang et al. 2023, table 1; mistralai/Mistral-7B-v0.1 (window 4096), -v0.3 (no window)
    "mistral-7b-v0.1": _LLAMA_2 | _shape(32, 4096, 32, groups=8, ffn=14336),
    "mistral-7b-v0.3": _MISTRAL_3 | _shape(32, 4096, 32, groups=8, ffn=14336),
    # Yang et al. 2024, table 1; Qwen/Qwen2-*
    "qwen2-0.5b": _QWEN2_SMALL | _shape(24, 896, 14, groups=2, ffn=4864),
    "qwen2-1.5b": _QWEN2_SMALL | _shape(28, 1536, 12, groups=2, ffn=8960),
    "qwen2-7b": _QWEN2 | _shape(28, 3584, 28, groups=4, ffn=18944),
    "qwen2-72b": _QWEN2 | _WIDER_EPSILON | _shape(80, 8192, 64, groups=8, ffn=29568),
    # Qwen Team 2024, table 1; Qwen/Qwen2.5-*
    "qwen2.5-0.5b": _QWEN2_SMALL | _SHORT | _shape(24, 896, 14, groups=2, ffn=4864),
    "qwen2.5-1.5b": _QWEN2_SMALL | _shape(28, 1536, 12, groups=2, ffn=8960),
    "qwen2.5-3b": _QWEN2_SMALL | _SHORT | _shape(36, 2048, 16, groups=2, ffn=11008),
    "qwen2.5-7b": _QWEN2 | _shape(28, 3584, 28, groups=4, ffn=18944),
    "qwen2.5-14b": _QWEN2 | _WIDER_EPSILON | _shape(48, 5120, 40, groups=8, ffn=13824),
    "qwen2.5-32b": _QWEN2 | _WIDER_EPSILON | _shape(64, 5120, 40, groups=8, ffn=27648),
    "qwen2.5-72b": _QWEN2 | _WIDER_EPSILON | _shape(80, 8192, 64, groups=8, ffn=29568),
    # Qwen Team 2025, table 1; Qwen/Qwen3-*
    "qwen3-0.6b": _QWEN3 | _TIED | _shape(28, 1024, 16, groups=8, ffn=3072),
    "qwen3-1.7b": _QWEN3 | _TIED | _shape(28, 2048, 16, groups=8, ffn=6144),
    "qwen3-4b": _QWEN3 | _TIED | _shape(36, 2560, 32, groups=8, ffn=9728),
    "qwen3-8b": _QWEN3 | _shape(36, 4096, 32, groups=8, ffn=12288),
    "qwen3-14b": _QWEN3 | _shape(40, 5120, 40, groups=8, ffn=17408),
    "qwen3-32b": _QWEN3 | _shape(64, 5120, 64, groups=8, ffn=25600),
    # Allal et al. 2025; HuggingFaceTB/SmolLM2-*
    "smollm2-135m": _SMOLLM2 | _shape(30, 576, 9, groups=3, ffn=1536),
    "smollm2-360m": _SMOLLM2 | _shape(32, 960, 15, groups=5, ffn=2560),
    "smollm2-1.7b": _SMOLLM2 | {"rotary_base": 130000.0} | _shape(24, 2048, 32, ffn=8192),
}
"""What each preset sets: its shape with its own vocabulary (except GPT-2's and BERT's, which take
the tokenizer's), dropout, and a sequence length to start with, that of the first stage of its
pretraining where it is published. Training is not part of it."""


def preset(name: PresetName | None) -> Fields:
    """The flags that a preset stands for, by field name; none without a preset."""
    return {} if name is None else dict(PRESETS[name])
