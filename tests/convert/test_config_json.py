"""config.json to fields of ModelConfig and back, without torch."""

import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import get_type_hints

import pytest

from megalite.config.run import keys_where
from megalite.convert.keys import Findings
from megalite.convert.model_config import architecture_for, read_fields, write_keys
from megalite.convert.tables import ARCHITECTURES, HARMLESS
from megalite.nn.config import ModelConfig

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0.dev0",
}
"""As Llama 3.1 8B has it."""
GPT2 = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "vocab_size": 50257,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_positions": 1024,
    "n_ctx": 1024,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
}
QWEN2 = {key: value for key, value in LLAMA.items() if not key.startswith("rope")} | {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "sliding_window": 32768,
    "use_sliding_window": False,
    "max_window_layers": 28,
}


def read(config: dict) -> tuple[dict, Findings]:
    found = Findings()
    return read_fields(config, found), found


def test_llama_3_1():
    values, found = read(LLAMA)
    assert not found.problems and not found.notes
    model = ModelConfig(**values)
    assert (model.num_layers, model.query_groups, model.ffn, model.head_size) == (32, 8, 14336, 128)
    assert (model.rope_scaling, model.rope_scaling_factor, model.rotary_base) == (
        "llama3",
        8.0,
        500000.0,
    )
    assert model.swiglu and model.disable_bias_linear and not model.tied


def test_the_newer_spelling_of_rope_is_the_same():
    newer = {key: value for key, value in LLAMA.items() if not key.startswith("rope")}
    newer["rope_parameters"] = {"rope_theta": 500000.0, **LLAMA["rope_scaling"]}
    assert read(newer)[0] == read(LLAMA)[0]
    assert read(newer | {"rope_theta": 500000.0})[0] == read(LLAMA)[0]
    assert "another key 10000.0" in read(newer | {"rope_theta": 10000.0})[1].problems[0]


def test_a_gpt2_s_defaults():
    values, found = read(GPT2)
    assert not found.problems
    model = ModelConfig(**values)
    assert (model.ffn, model.gelu, model.tied, model.hidden_dropout) == (3072, "tanh", True, 0.1)


def test_a_window_limits_the_positions():
    values, found = read(QWEN2)
    assert values["max_position_embeddings"] == 131072 and not found.notes
    assert values["add_qkv_bias"] and values["disable_bias_linear"]
    values, found = read(QWEN2 | {"use_sliding_window": True})
    assert values["max_position_embeddings"] == 32768
    assert "the sliding window, 32768, in place of 131072" in found.notes[0]
    mistral = LLAMA | {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    assert read(mistral)[0]["max_position_embeddings"] == 4096, "transformers' default"
    none = read(mistral | {"sliding_window": None})[0]
    assert none["max_position_embeddings"] == 131072


def llama3(**values) -> dict:
    """Another scaling."""
    return {"rope_scaling": LLAMA["rope_scaling"] | values}


REFUSED = {
    "another architecture": ({"model_type": "mamba"}, "model_type is 'mamba'; megalite knows gpt2"),
    "another class": (
        {"architectures": ["LlamaForSequenceClassification"]},
        "LlamaForSequenceClassification.*LlamaForCausalLM",
    ),
    "rope": (
        {"rope_scaling": {"rope_type": "yarn"}},
        "rope_type is 'yarn'; megalite knows 'default' and 'llama3'",
    ),
    "older key of rope": ({"rope_scaling": {"type": "linear"}}, "'linear'"),
    "a factor is missing": ({"rope_scaling": {"rope_type": "llama3"}}, "llama3 needs factor"),
    "rope of layers": (
        {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}, "rope_scaling": None},
        "full_attention, which megalite does not know",
    ),
    "partial": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    "one kind of bias": ({"attention_bias": True}, "attention_bias True and mlp_bias False"),
    "activation": ({"hidden_act": "relu"}, "hidden_act is 'relu'; megalite knows 'silu'"),
    "quantized": ({"quantization_config": {"bits": 4}}, "quantization_config.*bf16 first"),
    "missing": ({"vocab_size": None}, "vocab_size is missing"),
    "negative": ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
    "absurd": ({"intermediate_size": 10**30}, "intermediate_size is 10+; megalite reads up to"),
    "many layers": ({"num_hidden_layers": 10**9}, "reads up to 10,000"),
    "text": ({"vocab_size": "many"}, "vocab_size is 'many'"),
    "unknown": ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
    "parallel": ({"pretraining_tp": 2}, "pretraining_tp is 2"),
    "layers as a number": ({"layer_types": 5}, "layer_types is 5; it must be a list"),
    "layers as a text": ({"layer_types": "full_attention"}, "layer_types is 'full_attention'"),
    "a list of types": ({"model_type": ["llama"]}, r"model_type is \['llama'\]"),
    "lists of classes": ({"architectures": [["x"]]}, r"architectures is \[\['x'\]\]"),
    "a list of biases": ({"attention_bias": [1]}, r"attention_bias \[1\]"),
    "no epsilon": ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan; it must be .* above 0"),
    "epsilon below 0": ({"rms_norm_eps": -1e-5}, "rms_norm_eps is -1e-05"),
    "dropout": ({"attention_dropout": 5.0}, "attention_dropout is 5.0; .* at least 0 and below 1"),
    "endless base": ({"rope_theta": float("inf")}, "rope_theta is inf"),
    "deviation": ({"initializer_range": -1}, "initializer_range is -1"),
    "a huge number": ({"initializer_range": 10**400}, "initializer_range is 10+; it must be"),
    "factor": (llama3(factor=0.5), "factor is 0.5; it must be a number at least 1"),
    "factors": (llama3(high_freq_factor=1.0), "high_freq_factor is 1.0; it must be above"),
    "half a position": (
        llama3(original_max_position_embeddings=8192.5),
        "original_max_position_embeddings is 8192.5; it must be a whole number",
    ),
    "layers of other kinds": ({"layer_types": ["linear_attention"]}, "linear_attention"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_changes_the_model_is_refused(name):
    keys, words = REFUSED[name]
    problems = read(LLAMA | keys)[1].problems
    assert re.search(words, "\n".join(problems))
    assert len(problems) == (4 if "needs factor" in words else 1)


def test_all_problems_at_once():
    keys = {"hidden_act": "relu", "quantization_config": {}, "attention_bias": True, "x": 1}
    assert len(read(LLAMA | keys)[1].problems) == 4


def test_dropouts_of_a_gpt2_must_agree():
    (problem,) = read(GPT2 | {"resid_pdrop": [0.1]})[1].problems
    assert "resid_pdrop is [0.1]; it must be a number at least 0 and below 1" in problem
    assert read(GPT2 | {"resid_pdrop": 0.0, "embd_pdrop": 0.0})[0]["hidden_dropout"] == 0.0
    assert (
        "resid_pdrop 0.0 and embd_pdrop 0.1 differ"
        in read(GPT2 | {"resid_pdrop": 0.0})[1].problems[0]
    )


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_field_of_a_model_is_a_key(kind):
    """So a new field of ModelConfig that defines a model cannot be left out of a config.json."""
    defines = set(keys_where(lambda field: field.defines_model))
    of_llama3 = {"rope_scaling_factor", "rope_low_freq_factor", "rope_high_freq_factor"}
    of_llama3.add("rope_original_max_position_embeddings")
    idle = {"rotary_base"} if ARCHITECTURES[kind].ours == "bert" or kind == "gpt2" else set()
    idle |= of_llama3 if idle else set()
    assert defines - ARCHITECTURES[kind].fields == idle


def test_keys_are_known_once():
    for architecture in ARCHITECTURES.values():
        names = [name for keys in architecture.keys for name in keys.names]
        assert len(names) == len(set(names)) and not HARMLESS.intersection(names)


@pytest.mark.parametrize("config", [LLAMA, GPT2, QWEN2], ids=lambda config: config["model_type"])
def test_there_and_back(config):
    values, _ = read(config)
    model = ModelConfig(**values)
    found = Findings()
    keys = write_keys(model, ARCHITECTURES[config["model_type"]], found)
    assert not found.problems
    assert read(keys | {"architectures": config["architectures"]})[0] == values
    for key in {"hidden_size", "n_embd", "num_key_value_heads", "vocab_size"} & config.keys():
        assert keys[key] == config[key]


def test_the_architecture_is_found_for_a_model():
    models = {
        "gpt2": ModelConfig(vocab_size=100),
        "llama": ModelConfig(**read(LLAMA)[0]),
        "qwen2": ModelConfig(**read(QWEN2)[0]),
        "qwen3": replace(ModelConfig(**read(LLAMA)[0]), qk_layernorm=True, rope_scaling="none"),
    }
    for kind, model in models.items():
        assert architecture_for(model, None)[0].model_type == kind
    with pytest.raises(
        ValueError, match=r"gpt2: swiglu is True(.|\n)*llama: position_embedding_type"
    ):
        architecture_for(replace(models["gpt2"], swiglu=True), None)
    with pytest.raises(ValueError, match="mistral: biases|mistral: .*add_qkv_bias is True"):
        architecture_for(models["qwen2"], "mistral")


def test_no_torch_is_loaded():
    code = (
        "import sys, megalite.convert.published, megalite.convert.tokenizer_files, "
        "megalite.convert.draft; assert 'torch' not in sys.modules"
    )
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)


def test_fields_are_of_modelconfig():
    known = {field.name for field in fields(ModelConfig)}
    assert known == get_type_hints(ModelConfig).keys()
    for architecture in ARCHITECTURES.values():
        assert architecture.fields <= known
