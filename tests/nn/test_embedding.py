"""Word and position embeddings, whole and divided."""

import pytest
import torch
from torch.nn.functional import embedding

from megalite.nn.config import ModelConfig
from megalite.nn.embedding import Embedding
from megalite.nn.init import initialize
from megalite.nn.parameter import name_parameters
from megalite.nn.settings import LayerSettings
from megalite.parallel.boxes import Box
from megalite.parallel.context import ParallelContext
from megalite.parallel.layout import ParallelLayout
from megalite.parallel.rng import CounterBasedRng
from tests.tiny import settings_of

MODEL = ModelConfig(
    hidden_size=6,
    num_attention_heads=2,
    vocab_size=11,
    make_vocab_size_divisible_by=4,
    seq_length=8,
    max_position_embeddings=10,
)
TOKENS = torch.tensor([[0, 10, 5, 4, 4, 3, 7, 8], [9, 1, 2, 6, 0, 0, 10, 5]])


@pytest.mark.parametrize(
    ("vocabulary", "divisible_by", "tensor", "rows"),
    [
        (50257, 128, 1, 50304),
        (50257, 128, 8, 51200),
        (256, 128, 2, 256),
        (257, 128, 4, 512),
        (1, 1, 1, 1),
    ],
)
def test_padded_vocabulary(vocabulary, divisible_by, tensor, rows):
    model = ModelConfig(vocab_size=vocabulary, make_vocab_size_divisible_by=divisible_by)
    assert model.padded_vocabulary(tensor) == rows


def look_up(context: ParallelContext, sequence_parallel: bool):
    """Hidden states, this rank's box of the words, and the gradients of its rows and of its
    position table."""
    settings = LayerSettings(
        MODEL,
        context,
        CounterBasedRng.for_seed(0),
        dtype=torch.float64,
        sequence_parallel=sequence_parallel,
    )
    module = Embedding(settings)
    initialize(name_parameters(module), seed=4)
    hidden = module(TOKENS)
    # Different weights for every element, the same in any division of the sequence.
    weights = torch.arange(8 * 2 * 6, dtype=torch.float64).view(8, 2, 6)
    part = hidden.shape[0]
    start = context.tensor.rank * part if part < 8 else 0
    (hidden * weights[start : start + part]).sum().backward()
    words, positions = module.word_embeddings.weight, module.position_embeddings.weight
    return hidden.detach(), words.spec.box, words.grad, positions.grad


def on_rank(launch, sequence_parallel: bool):
    context = ParallelContext.create(ParallelLayout(tensor=launch.world_size), launch)
    return look_up(context, sequence_parallel)


def test_one_rank_is_torchs_embedding():
    module = Embedding(settings_of(MODEL, dtype=torch.float64))
    initialize(name_parameters(module), seed=4)
    words, positions = module.word_embeddings.weight, module.position_embeddings.weight
    assert words.shape == (12, 6) and positions.shape == (10, 6)
    expected = embedding(TOKENS, words).transpose(0, 1) + positions[:8].unsqueeze(1)
    torch.testing.assert_close(module(TOKENS), expected, rtol=0, atol=0)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_divided_vocabulary_gives_the_same(pool, ranks, sequence_parallel):
    """With 4 ranks of 4 rows for 11 entries, the last one holds padding only."""
    hidden, _, words, positions = look_up(ParallelContext.single(), False)
    results = pool.run(on_rank, ranks, sequence_parallel)
    got = torch.zeros(11, 6, dtype=torch.float64)
    for rank, (part, box, gradient, _) in enumerate(results):
        expected = hidden.chunk(ranks)[rank] if sequence_parallel else hidden
        torch.testing.assert_close(part, expected, rtol=1e-15, atol=0)
        got[box.slices_in(Box.whole((11, 6)))] = gradient[: box.shape[0]]
        assert not gradient[box.shape[0] :].any()
    torch.testing.assert_close(got, words[:11], rtol=1e-15, atol=0)
    # With a divided sequence, each rank's gradient of the table is a part that is still to be
    # summed.
    tables = [result[3] for result in results]
    total = sum(tables) if sequence_parallel else tables[0]
    torch.testing.assert_close(total, positions, rtol=1e-15, atol=0)
