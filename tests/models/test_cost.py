"""FLOPs against the published closed form and against counting; the output layer in units of a
layer."""

from dataclasses import replace

import pytest
from torch.utils.flop_counter import FlopCounterMode

from megalite.models.cost import HeadCost, flops_per_sequence, layer_weights, stage_flops
from megalite.models.shapes import decays, stage_shapes
from megalite.nn.config import ModelConfig, RecomputeConfig
from megalite.parallel.layout import ParallelLayout
from megalite.parallel.rng import CounterBasedRng
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
    """Names and shapes of every parameter on the first rank of every stage or stages."""
    config = configuration(layout)
    sizes = ParallelLayout(tensor=layout.tp, pipeline=layout.pp)
    model = config.model
    for position, rank in enumerate(sizes.group_of(0, "pipeline")):
        context = context_of(sizes, rank)
        built = build_model(config, context, CounterBasedRng.for_seed(0))
        rows = model.padded_vocabulary(layout.tp) // layout.tp
        found = {}
        for stage in config.pipeline.stages_of(position):
            layers = config.layers_of_stages[stage]
            found |= stage_shapes(model, config.head_cost, layers, rows=rows, tensor=layout.tp)
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


def test_work_of_stages():
    """In units of 2 s h^2: GPT-2's layer has 12 + 2 s / h, with its scores and values; its output
    layer v / h. BERT's output layer is computed for some tokens, its pooler for one."""
    h, s, v = 768, 1024, 50257
    gpt2 = ModelConfig(vocab_size=v)
    layer = 12 + 2 * s / h
    unit = 2 * s * h**2
    gpt = HeadCost()

    def work(layers: int, is_last: bool, head: HeadCost = gpt, **recompute) -> float:
        how = RecomputeConfig(**recompute)
        return stage_flops(gpt2, head, how, layers=layers, is_last=is_last) / unit

    assert work(5, False) == pytest.approx(3 * 5 * layer)
    assert work(5, True) == pytest.approx(3 * (5 * layer + v / h))
    bert = HeadCost(predicted=0.15, dense=True, pair_classes=2)
    pooled = (1 + 2 / h) / s
    assert work(5, True, bert) == pytest.approx(3 * (5 * layer + 0.15 * (v / h + 1) + pooled))
    # Recomputation adds forwards of layers, and none of the head.
    full = {"recompute_granularity": "full"}
    assert work(5, True, **full) == pytest.approx(4 * 5 * layer + 3 * v / h)
    block = full | {"recompute_method": "block", "recompute_num_layers": 2}
    assert work(5, False, **block) == pytest.approx((3 * 5 + 2) * layer)
    assert work(1, False, **block) == pytest.approx(4 * layer)
    assert work(5, False, recompute_activations=True) == pytest.approx(5 * (3 * layer + 2 * s / h))


def test_stages_together_do_what_the_model_does():
    model = ModelConfig(vocab_size=50257)
    for head in (HeadCost(), HeadCost(predicted=0.15, dense=True, pair_classes=2)):
        work = stage_flops(model, head, RecomputeConfig(), layers=7, is_last=False)
        work += stage_flops(model, head, RecomputeConfig(), layers=5, is_last=True)
        assert work == pytest.approx(flops_per_sequence(model, head), rel=1e-14)


def test_head_size_counts():
    """--kv-channels makes attention wider than the hidden size."""
    narrow = ModelConfig(hidden_size=64, num_attention_heads=4, vocab_size=100)
    wide = replace(narrow, kv_channels=64)
    assert layer_weights(wide) - layer_weights(narrow) == 4 * 64 * (256 - 64)
