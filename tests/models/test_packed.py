"""Documents in a row that are kept apart: none has an effect on another; and each stage reads what
it needs."""

from dataclasses import replace

import pytest
import torch

from megalite.data.loader import documents
from megalite.models.batch import Microbatch
from megalite.parallel.layout import ParallelLayout
from megalite.parallel.rng import CounterBasedRng
from megalite.training.batches import build_batches
from megalite.training.build import build_model
from tests.layouts import GPT2, LLAMA, PACKED, Layout, configuration
from tests.tiny import build, context_of

END = 256
LENGTHS = (5, 7, 1, 3)
"""Of the documents of a row, their ends included; the last one goes on behind the row."""
SHAPES = {"gpt": GPT2, "llama": replace(LLAMA, groups=2)}


def rows() -> torch.Tensor:
    """Two rows of packed documents, which end at the same places."""
    tokens = torch.randint(END, (2, sum(LENGTHS)), generator=torch.Generator().manual_seed(2))
    tokens[:, torch.tensor(LENGTHS[:-1]).cumsum(0) - 1] = END
    return tokens


def logits(model, tokens: torch.Tensor) -> torch.Tensor:
    """[b, s, v]."""
    positions, segments = (torch.from_numpy(array) for array in documents(tokens.numpy(), END))
    batch = Microbatch(
        tokens, samples=torch.arange(len(tokens)), positions=positions, segments=segments
    )
    with torch.no_grad():
        return model(None, batch).transpose(0, 1)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_no_document_changes_the_logits_of_another(shape, dropout):
    """To the bit, with fused attention and, for dropout, with the scores formed: what is not seen
    has weight 0."""
    model = build(
        Layout("any", shape=shape), attention_dropout=dropout, init_method_std=0.3
    ).components.model
    tokens, start = rows(), 0
    before = logits(model, tokens)
    for length in LENGTHS:
        changed, inside = tokens.clone(), slice(start, start + length)
        changed[:, inside] = torch.where(
            tokens[:, inside] == END, END, (tokens[:, inside] + 1) % END
        )
        after, here = logits(model, changed), torch.zeros(tokens.shape[1], dtype=torch.bool)
        here[inside] = True
        assert torch.equal(after[:, ~here], before[:, ~here])
        assert length == 1 or not torch.equal(after[:, here], before[:, here])
        start += length


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_packed_document_is_the_document_alone(shape):
    model, tokens = (
        build(Layout("any", shape=shape), init_method_std=0.3).components.model.eval(),
        rows(),
    )
    packed, start = logits(model, tokens), 0
    with torch.no_grad():
        unaware = model(None, Microbatch(tokens)).transpose(0, 1)
    for length in LENGTHS:
        inside = slice(start, start + length)
        with torch.no_grad():
            alone = model(None, Microbatch(tokens[:, inside])).transpose(0, 1)
        torch.testing.assert_close(packed[:, inside], alone, rtol=1e-11, atol=1e-13)
        assert start == 0 or (unaware[:, inside] - alone).abs().max() > 0.01
        start += length


TOKENS, LABELS = {"tokens"}, {"labels", "loss_mask"}
READS = {
    # (kind of positions, flags): fields that the first, middle and last stage read
    ("learned_absolute", ()): (TOKENS, set(), LABELS),
    ("rope", ()): (TOKENS, set(), LABELS),
    ("learned_absolute", ("reset_position_ids",)): (TOKENS | {"positions"}, set(), LABELS),
    ("rope", ("reset_position_ids",)): (
        TOKENS | {"positions"},
        {"positions"},
        LABELS | {"positions"},
    ),
    ("none", ("reset_attention_mask",)): (
        TOKENS | {"segments"},
        {"segments"},
        LABELS | {"segments"},
    ),
    ("rope", tuple(PACKED)): tuple(
        fields | {"positions", "segments"} for fields in (TOKENS, set(), LABELS)
    ),
}


@pytest.mark.parametrize("case", READS, ids=str)
def test_a_stage_reads_what_it_needs(case):
    """From the data itself, and not at all where it needs nothing."""
    kind, flags = case
    layout = Layout(
        "any",
        pp=3,
        shape=replace(GPT2, position_embedding_type=kind),
        flags=dict.fromkeys(flags, True),
    )
    config = configuration(layout)
    for stage, expected in enumerate(READS[case]):
        touched = []

        class Watched:
            def __getitem__(self, i, touched=touched):
                touched.append(i)
                return torch.cat([rows()[i % 2], torch.tensor([END])]).numpy()

        context = context_of(ParallelLayout(pipeline=3), stage)
        model = build_model(config, context, CounterBasedRng.for_seed(0))
        batch = build_batches(config, Watched(), model, eod=END).read(0)[0]
        assert {name for name, value in vars(batch).items() if value is not None} == expected | {
            "samples"
        }
        assert bool(touched) == bool(expected)
