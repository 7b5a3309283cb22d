"""Prints the table of presets of docs/models.md.

python -m tests.presets_table
"""

from megalite.config.estimate import model_parameters
from megalite.config.run import from_flat
from megalite.models.presets import PRESETS
from megalite.nn.config import ModelConfig

HEADER = (
    "| preset | parameters | layers | hidden | heads | kv heads | head size | MLP | vocabulary | "
    "positions | RoPE base | epsilon | tied | sequence |"
)


def lines() -> list[str]:
    """The table in Markdown."""
    rule = "|---" * HEADER.count(" | ") + "|---|"
    return [HEADER, rule, *(row(name) for name in PRESETS)]


def row(name: str) -> str:
    """The row of one preset. Without a vocabulary of its own, v stands for the tokenizer's."""
    config = from_flat({"preset": name})
    m: ModelConfig = config.model
    parameters = f"{model_parameters(config):,}"
    if m.vocab_size is None:
        each = m.hidden_size + (m.architecture == "bert")  # BERT's output layer has a bias
        parameters += f" + {each:,} v"
    cells = [
        f"`{name}`",
        parameters,
        m.num_layers,
        m.hidden_size,
        m.num_attention_heads,
        m.query_groups,
        m.head_size,
        m.ffn,
        m.vocab_size or "v",
        m.positions,
        f"{m.rotary_base:.0f}" if m.position_embedding_type == "rope" else "",
        f"{m.norm_epsilon:g}",
        "yes" if m.tied else "no",
        m.seq_length,
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


if __name__ == "__main__":
    print("\n".join(lines()))
