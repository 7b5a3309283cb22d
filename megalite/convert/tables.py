"""The architectures of Hugging Face that megalite knows: names of their tensors, keys of their
config.json. Imports no torch.

To add one: an Architecture in ARCHITECTURES. docs/huggingface.md shows these tables.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megalite.convert.keys import (
    Always,
    Biases,
    Dropouts,
    Heads,
    Keys,
    Only,
    Positions,
    Rope,
    Usual,
    Value,
)
from megalite.convert.pieces import Piece


@dataclass(frozen=True)
class Architecture:
    """What Hugging Face calls a model_type."""

    model_type: str
    ours: str
    """gpt or bert."""
    classes: dict[str, tuple[str, ...]]
    """Classes of transformers that can be read, the one of a file without `architectures` first:
    beginnings of our names that each has no tensors for."""
    prefix: str
    """Begins the names of all but the heads; files of a class without heads leave it out."""
    pieces: tuple[Piece, ...]
    keys: tuple[Keys, ...]
    untied: Piece
    """The output layer's weight."""
    ignored: tuple[str, ...] = ()
    """Ends of the names of tensors that are no parameters, or are stored twice."""

    @property
    def fields(self) -> set[str]:
        """Fields of ModelConfig that the keys determine."""
        return {field for keys in self.keys for field in keys.fields}


def _pair(theirs: str, ours: str, order: str = "", part: str = "") -> Iterator[Piece]:
    """Weight and bias of a linear layer or a norm. order: of the weight, whose last axis a bias
    does not have."""
    yield Piece(f"{theirs}.weight", f"{ours}.weight", order, part)
    without = order
    for axis in " h", " h)":
        without = without.replace(axis, axis[2:])
    yield Piece(f"{theirs}.bias", f"{ours}.bias", without, part)


def _pairs(*lines: tuple[str, ...]) -> tuple[Piece, ...]:
    return tuple(piece for line in lines for piece in _pair(*line))


_HEADS = "(g j d) h -> g j d h"
_GATED = "(u f) h -> u f h"
_LAYER = "model.layers.{}"

_LLAMA_PIECES = (
    Piece("model.embed_tokens.weight", "embedding.word_embeddings.weight"),
    *_pairs(
        (f"{_LAYER}.input_layernorm", "layers.{}.attention_norm"),
        (f"{_LAYER}.self_attn.q_proj", "layers.{}.attention.qkv", _HEADS, "queries"),
        (f"{_LAYER}.self_attn.k_proj", "layers.{}.attention.qkv", _HEADS, "key"),
        (f"{_LAYER}.self_attn.v_proj", "layers.{}.attention.qkv", _HEADS, "value"),
    ),
    Piece(f"{_LAYER}.self_attn.q_norm.weight", "layers.{}.attention.query_norm.weight"),
    Piece(f"{_LAYER}.self_attn.k_norm.weight", "layers.{}.attention.key_norm.weight"),
    *_pairs(
        (f"{_LAYER}.self_attn.o_proj", "layers.{}.attention.output"),
        (f"{_LAYER}.post_attention_layernorm", "layers.{}.mlp_norm"),
        (f"{_LAYER}.mlp.gate_proj", "layers.{}.mlp.up", _GATED, "gate"),
        (f"{_LAYER}.mlp.up_proj", "layers.{}.mlp.up", _GATED, "up"),
        (f"{_LAYER}.mlp.down_proj", "layers.{}.mlp.down"),
        ("model.norm", "final_norm"),
    ),
)

_GPT2_LAYER = "transformer.h.{}"
_GPT2_PIECES = (
    Piece("transformer.wte.weight", "embedding.word_embeddings.weight"),
    Piece("transformer.wpe.weight", "embedding.position_embeddings.weight"),
    *_pairs((f"{_GPT2_LAYER}.ln_1", "layers.{}.attention_norm")),
    Piece(
        f"{_GPT2_LAYER}.attn.c_attn.weight",
        "layers.{}.attention.qkv.weight",
        "h (j g d) -> g j d h",
    ),
    Piece(f"{_GPT2_LAYER}.attn.c_attn.bias", "layers.{}.attention.qkv.bias", "(j g d) -> g j d"),
    Piece(f"{_GPT2_LAYER}.attn.c_proj.weight", "layers.{}.attention.output.weight", "n h -> h n"),
    Piece(f"{_GPT2_LAYER}.attn.c_proj.bias", "layers.{}.attention.output.bias"),
    *_pairs((f"{_GPT2_LAYER}.ln_2", "layers.{}.mlp_norm")),
    Piece(f"{_GPT2_LAYER}.mlp.c_fc.weight", "layers.{}.mlp.up.weight", "h f -> f h"),
    Piece(f"{_GPT2_LAYER}.mlp.c_fc.bias", "layers.{}.mlp.up.bias"),
    Piece(f"{_GPT2_LAYER}.mlp.c_proj.weight", "layers.{}.mlp.down.weight", "f h -> h f"),
    Piece(f"{_GPT2_LAYER}.mlp.c_proj.bias", "layers.{}.mlp.down.bias"),
    *_pairs(("transformer.ln_f", "final_norm")),
)

_BERT_LAYER = "bert.encoder.layer.{}"
_BERT_EMBEDDINGS = "bert.embeddings"
_BERT_PIECES = (
    Piece(f"{_BERT_EMBEDDINGS}.word_embeddings.weight", "embedding.word_embeddings.weight"),
    Piece(f"{_BERT_EMBEDDINGS}.position_embeddings.weight", "embedding.position_embeddings.weight"),
    Piece(
        f"{_BERT_EMBEDDINGS}.token_type_embeddings.weight", "embedding.token_type_embeddings.weight"
    ),
    *_pairs(
        (f"{_BERT_EMBEDDINGS}.LayerNorm", "embedding_norm"),
        (f"{_BERT_LAYER}.attention.self.query", "layers.{}.attention.qkv", _HEADS, "queries"),
        (f"{_BERT_LAYER}.attention.self.key", "layers.{}.attention.qkv", _HEADS, "key"),
        (f"{_BERT_LAYER}.attention.self.value", "layers.{}.attention.qkv", _HEADS, "value"),
        (f"{_BERT_LAYER}.attention.output.dense", "layers.{}.attention.output"),
        (f"{_BERT_LAYER}.attention.output.LayerNorm", "layers.{}.attention_norm"),
        (f"{_BERT_LAYER}.intermediate.dense", "layers.{}.mlp.up"),
        (f"{_BERT_LAYER}.output.dense", "layers.{}.mlp.down"),
        (f"{_BERT_LAYER}.output.LayerNorm", "layers.{}.mlp_norm"),
        ("bert.pooler.dense", "pooler"),
        ("cls.predictions.transform.dense", "mlm_head.dense"),
        ("cls.predictions.transform.LayerNorm", "mlm_head.norm"),
    ),
    Piece("cls.predictions.bias", "mlm_head.bias"),
    *_pairs(("cls.seq_relationship", "pair_head")),
)


def _heads(config: dict[str, Any]) -> int | None:
    """num_attention_heads: the default of the heads of keys and values."""
    return config.get("num_attention_heads")


def _head_size(config: dict[str, Any]) -> int | None:
    """hidden_size / num_attention_heads: the default of the size of a head."""
    heads = config.get("num_attention_heads")
    width = config.get("hidden_size")
    if type(heads) is not int or type(width) is not int or heads < 1:
        return None
    return width // heads


def _four_times_width(config: dict[str, Any]) -> int | None:
    """4 n_embd: the default of n_inner."""
    width = config.get("n_embd")
    return None if type(width) is not int else 4 * width


_UNTIED = {True: False, False: True}
_GELU = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "erf"}
_NOT_SCALED = {"rope_scaling": "none", "add_qkv_bias": False, "qk_layernorm": False}


def _llama_keys(
    attention: tuple[Keys, ...],
    positions: Positions,
    *,
    key_heads: Any = _heads,
    head_size: tuple[Keys, ...] = (),
    always: dict[str, Any] | None = None,
    rope: Rope | None = None,
) -> tuple[Keys, ...]:
    """Keys that Llama and its descendants have in common, and those of one of them."""
    return (
        Value("hidden_size", "hidden_size"),
        Value("num_hidden_layers", "num_layers"),
        Value("num_attention_heads", "num_attention_heads"),
        Value("num_key_value_heads", "num_query_groups", key_heads),
        *(head_size or (Value("head_dim", "kv_channels", _head_size),)),
        Value("intermediate_size", "ffn_hidden_size"),
        Value("vocab_size", "vocab_size"),
        positions,
        rope or Rope(),
        Value("rms_norm_eps", "norm_epsilon", 1e-6, kind=float),
        Value("hidden_act", "swiglu", "silu", {"silu": True, "swish": True}),
        Value("tie_word_embeddings", "untie_embeddings_and_output_weights", False, choices=_UNTIED),
        Value("attention_dropout", "attention_dropout", 0.0, kind=float),
        Value("initializer_range", "init_method_std", 0.02, kind=float),
        *attention,
        Only("quantization_config", (None,), "convert quantized weights to bf16 first"),
        Only("pretraining_tp", (1,)),
        Usual({"gelu": "tanh", "hidden_dropout": 0.0}),
        Always(
            {
                "normalization": "RMSNorm",
                "norm_placement": "pre",
                "qk_layernorm": False,
                **(always or {}),
            }
        ),
    )


_LM = Piece("lm_head.weight", "output.weight")
_NO_BIAS = {"disable_bias_linear": True, "add_qkv_bias": False}
_BUFFERS = (".rotary_emb.inv_freq",)

ARCHITECTURES = {
    "gpt2": Architecture(
        model_type="gpt2",
        ours="gpt",
        classes={"GPT2LMHeadModel": (), "GPT2Model": ()},
        prefix="transformer.",
        pieces=_GPT2_PIECES,
        untied=_LM,
        ignored=(".attn.bias", ".attn.masked_bias"),
        keys=(
            Value("n_embd", "hidden_size"),
            Value("n_layer", "num_layers"),
            Value("n_head", "num_attention_heads"),
            Value("n_inner", "ffn_hidden_size", _four_times_width),
            Value("n_positions", "max_position_embeddings", 1024),
            Value("vocab_size", "vocab_size"),
            Value("activation_function", "gelu", "gelu_new", _GELU),
            Value("layer_norm_epsilon", "norm_epsilon", 1e-5, kind=float),
            Value(
                "tie_word_embeddings", "untie_embeddings_and_output_weights", True, choices=_UNTIED
            ),
            Dropouts(("resid_pdrop", "embd_pdrop")),
            Value("attn_pdrop", "attention_dropout", 0.1, kind=float),
            Value("initializer_range", "init_method_std", 0.02, kind=float),
            Only("scale_attn_weights", (True,)),
            Only("scale_attn_by_inverse_layer_idx", (False,)),
            Only("reorder_and_upcast_attn", (False,)),
            Only("add_cross_attention", (False,)),
            Only("quantization_config", (None,), "convert quantized weights to bf16 first"),
            Heads(),
            Always(
                {
                    "position_embedding_type": "learned_absolute",
                    "normalization": "LayerNorm",
                    "norm_placement": "pre",
                    "swiglu": False,
                    "disable_bias_linear": False,
                    **_NOT_SCALED,
                }
            ),
        ),
    ),
    "llama": Architecture(
        model_type="llama",
        ours="gpt",
        classes={"LlamaForCausalLM": (), "LlamaModel": ()},
        prefix="model.",
        pieces=_LLAMA_PIECES,
        untied=_LM,
        ignored=_BUFFERS,
        keys=_llama_keys((Biases(),), Positions()),
    ),
    "mistral": Architecture(
        model_type="mistral",
        ours="gpt",
        classes={"MistralForCausalLM": (), "MistralModel": ()},
        prefix="model.",
        pieces=_LLAMA_PIECES,
        untied=_LM,
        ignored=_BUFFERS,
        keys=_llama_keys(
            (), Positions(window_default=4096, default=131072), key_heads=8, always=_NO_BIAS
        ),
    ),
    "qwen2": Architecture(
        model_type="qwen2",
        ours="gpt",
        classes={"Qwen2ForCausalLM": (), "Qwen2Model": ()},
        prefix="model.",
        pieces=_LLAMA_PIECES,
        untied=_LM,
        ignored=_BUFFERS,
        keys=_llama_keys(
            (),
            Positions(window_default=4096, switch=True, default=32768),
            key_heads=32,
            always={"disable_bias_linear": True, "add_qkv_bias": True},
        ),
    ),
    "qwen3": Architecture(
        model_type="qwen3",
        ours="gpt",
        classes={"Qwen3ForCausalLM": (), "Qwen3Model": ()},
        prefix="model.",
        pieces=_LLAMA_PIECES,
        untied=_LM,
        ignored=_BUFFERS,
        keys=_llama_keys(
            (Biases(names=("attention_bias",)),),
            Positions(window_default=4096, switch=True, default=32768),
            key_heads=32,
            head_size=(Value("head_dim", "kv_channels", 128),),
            always={"qk_layernorm": True},
        ),
    ),
    "bert": Architecture(
        model_type="bert",
        ours="bert",
        classes={
            "BertForPreTraining": (),
            "BertForMaskedLM": ("pooler.", "pair_head."),
            "BertModel": ("mlm_head.", "pair_head.", "output."),
        },
        prefix="bert.",
        pieces=_BERT_PIECES,
        untied=Piece("cls.predictions.decoder.weight", "output.weight"),
        ignored=("embeddings.position_ids", "cls.predictions.decoder.bias"),
        keys=(
            Value("hidden_size", "hidden_size"),
            Value("num_hidden_layers", "num_layers"),
            Value("num_attention_heads", "num_attention_heads"),
            Value("intermediate_size", "ffn_hidden_size"),
            Value("max_position_embeddings", "max_position_embeddings", 512),
            Value("vocab_size", "vocab_size"),
            Value("hidden_act", "gelu", "gelu", {"gelu": "erf", **_GELU}),
            Value("layer_norm_eps", "norm_epsilon", 1e-12, kind=float),
            Value(
                "tie_word_embeddings", "untie_embeddings_and_output_weights", True, choices=_UNTIED
            ),
            Dropouts(("hidden_dropout_prob",)),
            Value("attention_probs_dropout_prob", "attention_dropout", 0.1, kind=float),
            Value("initializer_range", "init_method_std", 0.02, kind=float),
            Only("type_vocab_size", (2,)),
            Only("position_embedding_type", ("absolute",)),
            Only("is_decoder", (False,)),
            Only("add_cross_attention", (False,)),
            Only("quantization_config", (None,), "convert quantized weights to fp32 first"),
            Heads(),
            Always(
                {
                    "position_embedding_type": "learned_absolute",
                    "normalization": "LayerNorm",
                    "norm_placement": "post",
                    "swiglu": False,
                    "disable_bias_linear": False,
                    **_NOT_SCALED,
                }
            ),
        ),
    ),
}
"""By model_type."""

HARMLESS = frozenset(
    """
    architectures auto_map bad_words_ids begin_suppress_tokens
    bos_token_id chunk_size_feed_forward classifier_dropout cls_token_id decoder_start_token_id
    directionality do_sample dtype eos_token_id finetuning_task forced_bos_token_id
    forced_eos_token_id gradient_checkpointing id2label is_encoder_decoder label2id mask_token_id
    max_length model_type n_ctx output_attentions output_hidden_states output_past pad_token_id
    pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head
    pooler_type prefix problem_type pruned_heads remove_invalid_values return_dict sep_token_id
    summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj
    task_specific_params tokenizer_class torch_dtype torchscript transformers_version unsloth_fixed
    unsloth_version unk_token_id use_bfloat16 use_cache
    """.split()
)
"""Keys of a config.json that change no number that a model computes, beside those that begin with
an underscore."""
