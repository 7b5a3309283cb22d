"""The parameters of a model by name, without torch.

Letters: h hidden, g query groups, q queries a group, d head size, f ffn size, v vocabulary,
t tensor-parallel size. Names are global; shapes are those of one of t ranks.
"""

from math import prod

from megalite.models.cost import HeadCost
from megalite.nn.config import ModelConfig

Shapes = dict[str, tuple[int, ...]]
"""Shapes by name of parameter."""


def elements(shapes: Shapes) -> int:
    """Number of elements of all."""
    return sum(map(prod, shapes.values()))


def decays(name: str) -> bool:
    """Whether the parameter of this name has weight decay: biases and norms have none."""
    return not name.endswith((".bias", "norm.weight"))


def layer_shapes(model: ModelConfig, layer: int, tensor: int = 1) -> Shapes:
    """Parameters of a transformer layer."""
    h = model.hidden_size
    f = model.ffn // tensor
    up = (2, f) if model.swiglu else (f,)
    heads = model.num_attention_heads // tensor
    groups = model.query_groups // tensor
    qkv = (groups, model.num_attention_heads // model.query_groups + 2, model.head_size)
    found = {
        **_norm(model, "attention_norm"),
        "attention.qkv.weight": (*qkv, h),
        "attention.output.weight": (h, heads * model.head_size),
        **_norm(model, "mlp_norm"),
        **_linear(model, "mlp.up", up, h),
        "mlp.down.weight": (h, f),
    }
    if model.qkv_bias:
        found["attention.qkv.bias"] = qkv
    if model.qk_layernorm:
        found |= _norm(model, "attention.query_norm", model.head_size)
        found |= _norm(model, "attention.key_norm", model.head_size)
    if not model.disable_bias_linear:
        found |= {"attention.output.bias": (h,), "mlp.down.bias": (h,)}
    return {f"layers.{layer}.{name}": shape for name, shape in found.items()}


def embedding_shapes(model: ModelConfig, rows: int, head: HeadCost) -> Shapes:
    """Parameters before the layers, with `rows` rows of the word embedding."""
    h = model.hidden_size
    found = {"embedding.word_embeddings.weight": (rows, h)}
    if model.position_embedding_type == "learned_absolute":
        found["embedding.position_embeddings.weight"] = (model.positions, h)
    if head.token_types:
        found["embedding.token_type_embeddings.weight"] = (head.token_types, h)
    if model.post_norm:
        found |= _norm(model, "embedding_norm")
    return found


def head_shapes(model: ModelConfig, rows: int, head: HeadCost) -> Shapes:
    """Parameters after the layers, with `rows` rows of the output weight, a tied one under the name
    of the word embedding."""
    h = model.hidden_size
    found = {}
    if not model.post_norm:
        found |= _norm(model, "final_norm")
    if head.dense:
        found |= _linear(model, "mlm_head.dense", (h,), h) | _norm(model, "mlm_head.norm")
    if head.dense and not model.disable_bias_linear:
        found["mlm_head.bias"] = (rows,)
    if head.pair_classes:
        found |= _linear(model, "pooler", (h,), h)
        found |= _linear(model, "pair_head", (head.pair_classes,), h)
    output = "output.weight"
    if model.tied:
        output = "embedding.word_embeddings.weight"
    return found | {output: (rows, h)}


def stage_shapes(
    model: ModelConfig, head: HeadCost, layers: range, *, rows: int, tensor: int = 1
) -> Shapes:
    """Parameters of the stage that holds these layers, with `rows` rows of the vocabulary."""
    found = {}
    if 0 in layers:
        found |= embedding_shapes(model, rows, head)
    for layer in layers:
        found |= layer_shapes(model, layer, tensor)
    if model.num_layers - 1 in layers:
        found |= head_shapes(model, rows, head)
    return found


def _norm(model: ModelConfig, name: str, size: int | None = None) -> Shapes:
    """Of a norm over h, unless over another size."""
    shape = (size or model.hidden_size,)
    found = {f"{name}.weight": shape}
    if model.normalization == "LayerNorm":
        found[f"{name}.bias"] = shape
    return found


def _linear(model: ModelConfig, name: str, features: tuple[int, ...], width: int) -> Shapes:
    """Of a linear layer whose bias has the shape of its output."""
    found = {f"{name}.weight": (*features, width)}
    if not model.disable_bias_linear:
        found[f"{name}.bias"] = features
    return found
