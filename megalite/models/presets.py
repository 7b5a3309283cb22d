"""Shapes of published models, as flags. Imports no torch."""

from typing import Any

from megalite.nn.config import PresetName

_SHAPES: dict[str, tuple[int, int, int]] = {
    # Radford et al. 2019, table 2
    "gpt2": (12, 768, 12),
    "gpt2-medium": (24, 1024, 16),
    "gpt2-large": (36, 1280, 20),
    "gpt2-xl": (48, 1600, 25),
    # Devlin et al. 2018, section 3
    "bert-base": (12, 768, 12),
    "bert-large": (24, 1024, 16),
    # Shoeybi et al. 2019, table 4
    "megatron-bert-1.3b": (24, 2048, 32),
    "megatron-bert-3.9b": (48, 2560, 40),
}
"""Layers, hidden size, heads."""


def preset(name: PresetName) -> dict[str, Any]:
    """The flags that a preset stands for, by field name: shape, sequence length, and what differs
    between the families.

    The vocabulary is the tokenizer's, training is not part of it.
    """
    layers, hidden, heads = _SHAPES[name]
    shape = {"num_layers": layers, "hidden_size": hidden, "num_attention_heads": heads}
    if name.startswith("gpt2"):
        return {"architecture": "gpt", **shape, "seq_length": 1024}
    if name.startswith("megatron"):
        return {"architecture": "bert", **shape, "seq_length": 512}
    return {
        "architecture": "bert",
        **shape,
        "seq_length": 512,
        "norm_placement": "post",
        "gelu": "erf",
        "norm_epsilon": 1e-12,
    }
