"""FLOPs against the published closed form, and against counting."""

from dataclasses import replace

import pytest
from torch.utils.flop_counter import FlopCounterMode

from megalite.models.flops import flops_per_sequence
from megalite.nn.config import ModelConfig
from tests.layouts import GPT2, LLAMA, Layout
from tests.tiny import build


@pytest.mark.parametrize(
    ("layers", "h", "s", "v"), [(12, 768, 1024, 50257), (96, 12288, 2048, 51200), (1, 8, 4, 2)]
)
def test_gpt_equals_the_closed_form(layers, h, s, v):
    """72 B L s h^2 (1 + s / 6h + V / 12hL), Narayanan et al. 2021, for f = 4h and multi-head attention."""
    model = ModelConfig(
        num_layers=layers, hidden_size=h, num_attention_heads=4, seq_length=s, vocab_size=v
    )
    expected = 72 * layers * s * h**2 * (1 + s / (6 * h) + v / (12 * h * layers))
    assert flops_per_sequence(model) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize(
    "shape", [GPT2, LLAMA, replace(LLAMA, groups=2, head_size=6)], ids=["gpt", "llama", "groups"]
)
def test_torch_counts_as_many_in_a_forward(shape):
    """A third of a training step. With the scores formed, torch counts every product that the formula does; the
    vocabulary has no padding here, which torch would count as well."""
    shape = replace(shape, vocab=256)
    tiny = build(Layout("any", shape=shape), attention_dropout=0.1)
    batch = tiny.data.at(0)[0][0]
    with FlopCounterMode(display=False) as counter:
        tiny.parts.model(None, replace(batch, labels=None))
    assert 3 * counter.get_total_flops() == flops_per_sequence(tiny.config.model)
