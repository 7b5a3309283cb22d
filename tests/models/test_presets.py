"""Presets against the published numbers of parameters, and against transformers' models."""

from typing import get_args

import pytest
import torch

from megalite.config import validate
from megalite.config.estimate import model_parameters
from megalite.config.run import from_flat
from megalite.models.presets import PRESETS, preset
from megalite.nn.config import PresetName

BERT_VOCABULARY = 30522
PUBLISHED = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "bert-base": 110_106_428,
    "bert-large": 336_226_108,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "qwen2-0.5b": 494_032_768,
    "qwen2-1.5b": 1_543_714_304,
    "qwen2-7b": 7_615_616_512,
    "qwen2-72b": 72_706_203_648,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
}
"""Numbers of elements of the published weights, a tied one counted once; BERT's with the heads of
its pretraining."""
VOCABULARIES = {"gpt2": 50257, "bert": BERT_VOCABULARY}
"""Of the presets that have none of their own."""


def test_every_preset_has_a_name_and_a_number():
    assert tuple(PRESETS) == get_args(PresetName)
    assert set(PRESETS) - set(PUBLISHED) == {"megatron-bert-1.3b", "megatron-bert-3.9b"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_as_many_as_published(name):
    own = {"vocab_size": VOCABULARIES.get(name.split("-")[0])}
    config = from_flat({"preset": name} | own | PRESETS[name])
    assert model_parameters(config) == PUBLISHED[name]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_sound(name):
    """It needs a size of the vocabulary where it has none, and nothing else of the model."""
    data = {"mock_data": True, "train_iters": 1, "device": "cpu", "distributed_backend": "gloo"}
    if "vocab_size" not in PRESETS[name]:
        assert validate.check(from_flat(data | {"preset": name}), 1)
        data["vocab_size"] = BERT_VOCABULARY
    assert validate.check(from_flat(data | {"preset": name}), 1) == []


def test_a_preset_is_not_shared():
    preset("gpt2")["num_layers"] = 3
    assert preset("gpt2")["num_layers"] == 12
    assert preset(None) == {}


@pytest.mark.parametrize(
    "name",
    [
        "llama-2-7b",
        "llama-3.1-8b",
        "llama-3.2-1b",
        "mistral-7b-v0.1",
        "qwen2-0.5b",
        "qwen3-0.6b",
        "smollm2-135m",
    ],
)
def test_transformers_model_of_the_shape_is_as_large(name):
    """Built on the meta device from what the preset says, in the class of its family."""
    from transformers import AutoConfig, AutoModelForCausalLM

    m = from_flat({"preset": name}).model
    kind = {"mis": "mistral", "qwen2": "qwen2", "qwen3": "qwen3"}
    family = next((kind[key] for key in kind if name.startswith(key)), "llama")
    config = AutoConfig.for_model(
        family,
        vocab_size=m.vocab_size,
        hidden_size=m.hidden_size,
        intermediate_size=m.ffn,
        num_hidden_layers=m.num_layers,
        num_attention_heads=m.num_attention_heads,
        num_key_value_heads=m.query_groups,
        head_dim=m.head_size,
        tie_word_embeddings=m.tied,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert model.num_parameters() == PUBLISHED[name]
