"""A model of Megatron-LM as one of megalite: its arguments, and the names of its tensors. Imports
no torch.

Letters: L layers, h hidden, g query groups, q queries a group, d head size, f ffn size, v
vocabulary, t tensor-parallel size of the checkpoint.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megalite.convert.keys import MOST, MOST_LAYERS

Layout = Literal["whole", "vocabulary", "rows", "columns", "qkv", "gate_up"]
"""How t ranks share a tensor, and what one rank stores.

whole: every rank all of it. rows, columns: a slice of dim 0, of dim 1. vocabulary: rows, with
padding after the last. qkv: the rows of some query groups, each group its queries, key and value
(in the order of the checkpoint's version). gate_up: the gate's rows, then those of the other half.
"""


@dataclass(frozen=True)
class Source:
    """Where a tensor of megalite comes from."""

    layout: Layout
    names: tuple[str, ...]
    """What it is called in Megatron-LM: one name for each generation of its code."""


def _named(layout: Layout, *names: str) -> Source:
    return Source(layout, names)


def _norm(kind: str, *names: str) -> Source:
    """Of a norm with several names; in Transformer Engine it belongs to the linear layer that
    follows it."""
    spelt = []
    for name in names:
        joint = "_" if name.endswith("layer_norm") else "."
        spelt.append(f"{name}{joint}{kind}")
    return Source("whole", tuple(spelt))


def _norms(kind: str) -> dict[str, Source]:
    return {
        f"attention_norm.{kind}": _norm(
            kind, "input_layernorm", "input_norm", "self_attention.linear_qkv.layer_norm"
        ),
        f"mlp_norm.{kind}": _norm(
            kind,
            "post_attention_layernorm",
            "post_attention_norm",
            "pre_mlp_layernorm",
            "mlp.linear_fc1.layer_norm",
        ),
        f"attention.query_norm.{kind}": _norm(kind, "self_attention.q_layernorm"),
        f"attention.key_norm.{kind}": _norm(kind, "self_attention.k_layernorm"),
    }


def _linears(kind: str, across: Layout) -> dict[str, Source]:
    """across: the layout of the layers that ranks share by their inputs; their bias is whole."""
    return {
        f"attention.qkv.{kind}": _named(
            "qkv",
            f"attention.query_key_value.{kind}",
            f"self_attention.query_key_value.{kind}",
            f"self_attention.linear_qkv.{kind}",
        ),
        f"attention.output.{kind}": _named(
            across,
            f"attention.dense.{kind}",
            f"self_attention.dense.{kind}",
            f"self_attention.linear_proj.{kind}",
        ),
        # With SwiGLU gate_up, see `source_of`.
        f"mlp.up.{kind}": _named("rows", f"mlp.dense_h_to_4h.{kind}", f"mlp.linear_fc1.{kind}"),
        f"mlp.down.{kind}": _named(across, f"mlp.dense_4h_to_h.{kind}", f"mlp.linear_fc2.{kind}"),
    }


LAYER_SOURCES: dict[str, Source] = {
    **_norms("weight"),
    **_norms("bias"),
    **_linears("weight", "columns"),
    **_linears("bias", "whole"),
}
"""Of the tensors of a layer, by megalite's name after `layers.N.`; the names there follow the
layer's too."""

OTHER_SOURCES: dict[str, Source] = {
    "embedding.word_embeddings.weight": _named(
        "vocabulary",
        "language_model.embedding.word_embeddings.weight",
        "embedding.word_embeddings.weight",
    ),
    "embedding.position_embeddings.weight": _named(
        "whole",
        "language_model.embedding.position_embeddings.weight",
        "embedding.position_embeddings.weight",
    ),
    "output.weight": _named(
        "vocabulary", "language_model.output_layer.weight", "output_layer.weight"
    ),
    **{
        f"final_norm.{kind}": _named(
            "whole",
            f"language_model.transformer.final_layernorm.{kind}",
            f"language_model.encoder.final_layernorm.{kind}",
            f"language_model.encoder.final_norm.{kind}",
            f"decoder.final_layernorm.{kind}",
        )
        for kind in ("weight", "bias")
    },
}
"""Of the tensors before and after the layers."""

LAYER_PREFIXES = (
    "language_model.transformer.layers.",
    "language_model.encoder.layers.",
    "decoder.layers.",
)
"""What comes before the number of a layer, which counts the layers of one stage."""

TIED_COPIES = ("word_embeddings_for_head.weight", "word_embeddings.weight", "output_layer.weight")
"""Names of the last stage's copy of a tied embedding."""

COMPUTED = ("_extra_state", "inv_freq")
"""Last parts of the names of what a layer keeps beside weights, and computes itself."""

OTHER_MODELS = {
    "lm_head": "a BERT: its head for masked words has another GELU than its layers",
    "decoder.layers.0.inter_attention": "a T5",
}
"""What shows that a model is no GPT."""


JOINED_DIMS: dict[Layout, int] = {"qkv": 3, "gate_up": 2}
"""How many first dims of megalite's shape are one in Megatron-LM's."""


def stored_shape(shape: tuple[int, ...], layout: Layout) -> tuple[int, ...]:
    """The shape in Megatron-LM of a tensor, or of a rank's share of one."""
    joined = JOINED_DIMS.get(layout, 1)
    return (math.prod(shape[:joined]), *shape[joined:])


def source_of(name: str, swiglu: bool) -> tuple[int | None, Source]:
    """(layer, source) of the tensor that megalite calls `name`; layer None: it belongs to none."""
    if not name.startswith("layers."):
        return None, OTHER_SOURCES[name]
    _, layer, rest = name.split(".", 2)
    source = LAYER_SOURCES[rest]
    if swiglu and rest.startswith("mlp.up."):
        source = Source("gate_up", source.names)
    return int(layer), source


# The arguments.
# ------------------------------------------------------------------------------------------------

OFF = (None, False, 0)
UNSUPPORTED: dict[str, tuple[tuple, str]] = {
    "num_experts": (OFF, "experts"),
    "multi_latent_attention": (OFF, "latent attention"),
    "mtp_num_layers": (OFF, "prediction of several tokens"),
    "hybrid_layer_pattern": (OFF, "layers of several kinds"),
    "hybrid_override_pattern": (OFF, "layers of several kinds"),
    "heterogeneous_layers_config_encoded_json": (OFF, "layers of several shapes"),
    "experimental_attention_variant": (OFF, "another attention"),
    "attention_output_gate": (OFF, "gated attention"),
    "qk_l2_norm": (OFF, "normalisation of queries and keys without weights"),
    "no_rope_freq": (OFF, "layers without RoPE"),
    "window_size": (OFF, "a sliding window"),
    "window_attn_skip_freq": (OFF, "a sliding window"),
    "softmax_scale": ((None,), "another scale of the scores"),
    "softmax_type": ((None, "vanilla"), "another softmax"),
    "apply_layernorm_1p": (OFF, "norms that add 1 to their weight"),
    "layernorm_zero_centered_gamma": (OFF, "norms that add 1 to their weight"),
    "apply_residual_connection_post_layernorm": (OFF, "residuals taken after a norm"),
    "rotary_percent": ((None, 1), "RoPE of a part of each head"),
    "rotary_interleaved": (OFF, "RoPE of neighbouring components"),
    "rotary_seq_len_interpolation_factor": ((None, 1), "interpolated RoPE"),
    "squared_relu": (OFF, "squared ReLU"),
    "quick_geglu": (OFF, "gated quick GELU"),
    "activation_func_clamp_value": ((None,), "a bounded activation"),
    "glu_linear_offset": (OFF, "an offset in the gated MLP"),
    "use_mup": (OFF, "scaled logits"),
    "retro_add_retriever": (OFF, "retrieval"),
}
"""Arguments that change what a model computes: the values that change nothing, and what another one
means."""

COPIED = {
    "num_layers": int,
    "hidden_size": int,
    "num_attention_heads": int,
    "num_query_groups": int,
    "ffn_hidden_size": int,
    "kv_channels": int,
    "seq_length": int,
    "max_position_embeddings": int,
    "make_vocab_size_divisible_by": int,
    "hidden_dropout": float,
    "attention_dropout": float,
    "init_method_std": float,
    "rotary_base": float,
    "rope_scaling_factor": float,
    "norm_epsilon": float,
    "add_qkv_bias": bool,
    "qk_layernorm": bool,
    "swiglu": bool,
    "untie_embeddings_and_output_weights": bool,
}
"""Arguments with the name and the meaning of megalite's fields. An argument that an old checkpoint
does not have leaves the field at its default, which is what old code did."""
NEEDED = ("num_layers", "hidden_size", "num_attention_heads")
POSITIONS = ("learned_absolute", "rope", "none")
NORMALIZATIONS = ("LayerNorm", "RMSNorm")


def model_fields(
    args: Mapping[str, Any], tensor: int, vocab_size: int | None
) -> tuple[dict[str, Any], list[str]]:
    """(fields of ModelConfig, problems) of the arguments that a checkpoint was made with.

    Args:
        args: `args` of the checkpoint, by name.
        tensor: its tensor-parallel size, which the padding of the vocabulary depends on.
        vocab_size: entries of the vocabulary without padding, where the user says so.
    """
    problems = []
    for name, (harmless, meaning) in UNSUPPORTED.items():
        value = args.get(name)
        if value not in harmless:
            problems.append(f"{name} {value!r}: {meaning} is not supported")
    fields: dict[str, Any] = {"architecture": "gpt"}
    epsilon = _with_default(args, "norm_epsilon", args.get("layernorm_epsilon"))
    known = {**args, "norm_epsilon": epsilon}
    # What has no effect without a switch may say anything.
    if not args.get("group_query_attention"):
        known.pop("num_query_groups", None)
    if not args.get("use_rope_scaling"):
        known.pop("rope_scaling_factor", None)
    for name, kind in COPIED.items():
        value = known.get(name)
        if value is None:
            if name in NEEDED:
                problems.append(f"{name} is missing")
        elif _is_of(kind, name, value):
            fields[name] = kind(value)
        else:
            problems.append(f"{name} {value!r} is not {_WORDS[kind]}")
    fields["disable_bias_linear"] = not _with_default(args, "add_bias_linear", True)
    if args.get("disable_bias_linear"):
        fields["disable_bias_linear"] = True
    if fields["disable_bias_linear"] is False:
        fields.pop("add_qkv_bias", None)  # every linear layer has a bias
    for part in (_positions, _norm_and_activation):
        found, wrong = part(args)
        fields |= found
        problems += wrong
    size, wrong = _vocabulary(args, tensor, vocab_size)
    fields["vocab_size"] = size
    return fields, problems + wrong


_WORDS: dict[Callable, str] = {
    int: "a whole number from 1 to what a model may have",
    float: "a number",
    bool: "true or false",
}


def _is_of(kind: Callable, name: str, value: Any) -> bool:
    """Whether the value of an argument can be a field's. A file may hold anything."""
    if not isinstance(value, (int, float)) or not math.isfinite(value) or kind(value) != value:
        return False
    most = MOST_LAYERS if name == "num_layers" else MOST
    return kind is not int or 1 <= value <= most


def _with_default(args: Mapping[str, Any], name: str, default: Any) -> Any:
    value = args.get(name)
    return default if value is None else value


def _positions(args: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """How positions enter."""
    kind = _with_default(args, "position_embedding_type", "learned_absolute")
    if args.get("use_rotary_position_embeddings"):
        kind = "rope"
    elif kind == "learned_absolute" and args.get("add_position_embedding") is False:
        kind = "none"
    if kind not in POSITIONS:
        return {}, [f"position_embedding_type {kind!r}: possible are {', '.join(POSITIONS)}"]
    fields = {"position_embedding_type": kind}
    if args.get("use_rope_scaling"):
        # Beside its factor, the numbers are constants there, and the defaults here.
        fields["rope_scaling"] = "llama3"
    return fields, []


def _norm_and_activation(args: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The kind of norms, and the form of GELU."""
    normalization = _with_default(args, "normalization", "LayerNorm")
    fields = {"normalization": normalization}
    if not args.get("swiglu"):
        # The fused kernel computes the approximation, torch's GELU, which is taken otherwise, the
        # exact form.
        fused = _with_default(args, "bias_gelu_fusion", True) or args.get("openai_gelu")
        fields["gelu"] = "tanh" if fused else "erf"
    if normalization in NORMALIZATIONS:
        return fields, []
    possible = ", ".join(NORMALIZATIONS)
    return fields, [f"normalization {normalization!r}: possible are {possible}"]


def _vocabulary(
    args: Mapping[str, Any], tensor: int, given: int | None
) -> tuple[int | None, list[str]]:
    """Entries of the vocabulary without padding."""
    padded = args.get("padded_vocab_size")
    size = given
    if size is None:
        size = args.get("vocab_size")
        if isinstance(size, int) and args.get("tokenizer_type") == "NullTokenizer":
            size += 1  # its end-of-document token
    if size is not None and not _is_of(int, "vocab_size", size):
        return None, [f"vocab_size {size!r} is not {_WORDS[int]}"]
    if size is None:
        advice = "give --vocab-size, the entries of the tokenizer"
        return None, [f"the checkpoint knows only the padded vocabulary, {padded}: {advice}"]
    for name in ("padded_vocab_size", "make_vocab_size_divisible_by"):
        if args.get(name) is not None and not _is_of(int, name, args[name]):
            return size, [f"{name} {args[name]!r} is not {_WORDS[int]}"]
    multiple = _with_default(args, "make_vocab_size_divisible_by", 128) * tensor
    wanted = -(-size // multiple) * multiple
    if padded is not None and padded != wanted:
        problem = f"--vocab-size {size}: padded to a multiple of {multiple} that is {wanted} rows"
        return size, [f"{problem}, the checkpoint has {padded}"]
    return size, []
