"""FLOPs against the published closed form and against counting; the output layer in units of a
layer."""

from dataclasses import replace

import pytest
from torch.utils.flop_counter import FlopCounterMode

from megalite.models.cost import flops_per_sequence, layer_weights, output_cost
from megalite.models.shapes import decays, stage_shapes
from megalite.nn.config import ModelConfig
from megalite.parallel.layout import ParallelLayout
from megalite.parallel.rng import CounterBasedRng
from megalite.pipeline.partition import layers_of_stages
from megalite.training.build import build_model
from tests.layouts import GPT2, LAYOUTS, LLAMA, Layout, configuration
from tests.tiny import build, context_of


@pytest.mark.parametrize(
    ("layers", "h", "s", "v"), [(12, 768, 1024, 50257), (96, 12288, 2048, 51200), (1, 8, 4, 2)]
)
def test_gpt_equals_the_closed_form(layers, h, s, v):
    """72 B L s h^2 (1 + s / 6h + V / 12hL), Narayanan et al. 2021, for f = 4h and multi-head
    attention."""
    model = ModelConfig(
        num_layers=layers, hidden_size=h, num_attention_heads=4, seq_length=s, vocab_size=v
    )
    expected = 72 * layers * s * h**2 * (1 + s / (6 * h) + v / (12 * h * layers))
    assert flops_per_sequence(model) == pytest.approx(expected, rel=1e-14)


NAMED = [x for x in LAYOUTS if x.dp == 1 and not x.packing]


@pytest.mark.parametrize("layout", NAMED, ids=lambda layout: layout.name)
def test_shapes_are_those_of_the_model(layout):
    """Names and shapes of every parameter on the first rank of every stage."""
    config = configuration(layout)
    sizes = ParallelLayout(tensor=layout.tp, pipeline=layout.pp)
    model = config.model
    stages = layers_of_stages(model, layout.pp, config.predicted)
    for stage, rank in zip(stages, sizes.group_of(0, "pipeline")):
        context = context_of(sizes, rank)
        built = build_model(config, context, CounterBasedRng.for_seed(0))
        rows = model.padded_vocabulary(layout.tp) // layout.tp
        found = stage_shapes(model, config.head_cost, stage, rows=rows, tensor=layout.tp)
        parameters = built.parameters_by_name
        assert found == {name: p.shape for name, p in parameters.items()}
        assert all(decays(name) == p.spec.weight_decay for name, p in parameters.items())


@pytest.mark.parametrize(
    "shape", [GPT2, LLAMA, replace(LLAMA, groups=2, head_size=6)], ids=["gpt", "llama", "groups"]
)
def test_torch_counts_as_many_in_a_forward(shape):
    """A third of a training step. With the scores formed, torch counts every product that the
    formula does; the vocabulary has no padding here, which torch would count as well."""
    shape = replace(shape, vocab=256)
    tiny = build(Layout("any", shape=shape), attention_dropout=0.1)
    batch = tiny.data.at(0)[0][0]
    with FlopCounterMode(display=False) as counter:
        tiny.components.model(None, replace(batch, labels=None))
    assert 3 * counter.get_total_flops() == flops_per_sequence(tiny.config.model)


def test_output_cost_is_the_ratio_of_weights():
    """GPT-2: 50257 x 768 against 12 x 768^2 of a layer. Llama 3 70B has 8 groups of 64 heads, an
    MLP of three matrices."""
    gpt2 = ModelConfig(vocab_size=50257)
    assert output_cost(gpt2) == pytest.approx(50257 / (12 * 768))
    llama = ModelConfig(
        hidden_size=8192,
        num_attention_heads=64,
        num_query_groups=8,
        ffn_hidden_size=28672,
        swiglu=True,
        vocab_size=128256,
    )
    assert output_cost(llama) == pytest.approx(1.228, abs=1e-3)
    assert output_cost(llama, predicted=0.15) == pytest.approx(0.15 * output_cost(llama))


def test_head_size_counts():
    """--kv-channels makes attention wider than the hidden size."""
    narrow = ModelConfig(hidden_size=64, num_attention_heads=4, vocab_size=100)
    wide = replace(narrow, kv_channels=64)
    assert layer_weights(wide) - layer_weights(narrow) == 4 * 64 * (256 - 64)
