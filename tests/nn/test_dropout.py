"""Dropout at its places: which element of the whole model each element of a rank is."""

import pytest
import torch

from megalite.nn.config import ModelConfig
from megalite.nn.dropout import AFTER_MLP, AttentionDropout, HiddenDropout
from megalite.nn.settings import LayerSettings
from megalite.parallel.layout import ParallelLayout
from megalite.parallel.rng import CounterBasedRng, RngTracker
from megalite.training.batches import build_batches
from megalite.training.build import build_model
from tests.layouts import configuration
from tests.tiny import SINGLE, build, context_of, settings_of

SEQUENCE, BATCH, HIDDEN, HEADS = 8, 3, 40, 4
SAMPLES = torch.arange(70, 70 + BATCH)
TENSORS = ParallelLayout(tensor=4)
MODEL = ModelConfig(hidden_dropout=0.5, attention_dropout=0.5)


def hidden_dropout(
    layout=TENSORS, rank=0, sequence_parallel=False, scheme="global"
) -> HiddenDropout:
    context = context_of(layout, rank)
    rng = CounterBasedRng.for_seed(1) if scheme == "global" else RngTracker.for_rank(1, context)
    settings = LayerSettings(MODEL, context, rng, sequence_parallel=sequence_parallel)
    return HiddenDropout(settings, 2, AFTER_MLP)


def test_parts_of_a_sequence_are_dropped_like_the_whole():
    x = torch.randn(SEQUENCE, BATCH, HIDDEN)
    whole = hidden_dropout(ParallelLayout())(x, SAMPLES)
    parts = [
        hidden_dropout(TENSORS, rank, True)(part, SAMPLES) for rank, part in enumerate(x.chunk(4))
    ]
    assert torch.equal(torch.cat(parts), whole)
    for rank in range(4):
        assert torch.equal(hidden_dropout(TENSORS, rank)(x, SAMPLES), whole)
    assert torch.equal(hidden_dropout()(x[:, 1:], SAMPLES[1:]), whole[:, 1:])


def test_heads_are_dropped_alike_wherever_they_are():
    weights = torch.randn(BATCH, HEADS, SEQUENCE, SEQUENCE)
    whole = AttentionDropout(settings_of(MODEL, seed=1), 2)(weights, SAMPLES)
    parts = [
        AttentionDropout(settings_of(MODEL, TENSORS, rank, seed=1), 2)(part, SAMPLES)
        for rank, part in enumerate(weights.chunk(4, dim=1))
    ]
    assert torch.equal(torch.cat(parts, dim=1), whole)


def test_streams_drop_alike_what_ranks_hold_alike():
    x = torch.randn(SEQUENCE, BATCH, HIDDEN)
    alike = [hidden_dropout(TENSORS, rank, scheme="megatron")(x, None) for rank in (0, 3)]
    own = [hidden_dropout(TENSORS, rank, True, scheme="megatron")(x, None) for rank in (0, 3)]
    assert torch.equal(*alike) and not torch.equal(*own)


@pytest.mark.parametrize("scheme", ["global", "megatron"])
def test_bias_and_residual_are_added_around_it(scheme):
    x, bias, residual = (
        torch.randn(SEQUENCE, BATCH, HIDDEN),
        torch.randn(HIDDEN),
        torch.randn(SEQUENCE, BATCH, HIDDEN),
    )
    y = hidden_dropout(scheme=scheme)(x, SAMPLES, bias, residual)
    alone = hidden_dropout(scheme=scheme)(torch.ones_like(x), SAMPLES)
    torch.testing.assert_close(y, residual + alone * (x + bias))
    evaluation = hidden_dropout(scheme=scheme).eval()(x, None, bias, residual)
    torch.testing.assert_close(evaluation, residual + x + bias)


def test_each_place_of_a_model_has_its_own_number():
    model = build(hidden_dropout=0.1, attention_dropout=0.1).components.model
    places = [m.site_id for m in model.modules() if isinstance(m, HiddenDropout | AttentionDropout)]
    assert len(set(places)) == len(places) == 1 + 3 * model.model_config.num_layers


@pytest.mark.parametrize(("data", "micro_batch_size"), [(1, 1), (1, 4), (2, 2), (4, 1)])
def test_samples_are_numbered_through_the_whole_run(data, micro_batch_size):
    """Not within an epoch: data that comes again is dropped otherwise than before."""
    rows = torch.arange(4 * 9).view(4, 9)

    class Epochs:
        def __getitem__(self, i):
            return rows[i % len(rows)].numpy()

    seen, layout = {}, ParallelLayout(data=data)
    for rank in range(data):
        config, context = (
            configuration(SINGLE, micro_batch_size=micro_batch_size),
            context_of(layout, rank),
        )
        batches = build_batches(
            config, Epochs(), build_model(config, context, CounterBasedRng.for_seed(0))
        )
        for consumed in (0, 8):
            for batch in batches.read(consumed):
                seen |= dict(zip(batch.samples.tolist(), batch.tokens[:, 0].tolist()))
    assert sorted(seen) == list(range(16))
    assert all(token == 9 * (i % 4) for i, token in seen.items())
