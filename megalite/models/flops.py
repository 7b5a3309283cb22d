"""Floating-point operations of a model, for throughput figures. Pure arithmetic."""

from megalite.nn.config import ModelConfig


def flops_per_sequence(model: ModelConfig, predicted: float = 1.0, heads: bool = False) -> float:
    """Model FLOPs of one training sequence, forward and backward (3 times the forward; recomputation not counted).

    predicted: share of the tokens that the output layer is computed for. heads: whether a dense layer [h, h] comes
    before it, as in BERT, whose pooler is left out.

    A forward takes 2 s per weight of a matrix product, output layer included, and 4 L s^2 n d for scores and values,
    counted in full, not halved for the causal mask (Narayanan et al. 2021, appendix, in its general form).
    """
    h, f, s, d = model.hidden_size, model.ffn, model.seq_length, model.head_size
    n, g, layers = model.num_attention_heads, model.query_groups, model.num_layers
    layer = h * d * (n + 2 * g) + n * d * h + (3 if model.swiglu else 2) * h * f
    weights = layers * layer + predicted * (model.vocab_size + (h if heads else 0)) * h
    return 3.0 * (2 * s * weights + 4 * layers * s**2 * n * d)
