"""The oracle's dropout against docs/randomness.md, and in place against Hugging Face's GPT-2 and
BERT."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests import oracle, test_oracle, test_oracle_bert
from tests.oracle import Dropout, Parameters, Shape
from tests.oracle_dropout import (
    AFTER_ATTENTION,
    AFTER_MLP,
    ATTENTION_WEIGHTS,
    EMBEDDING,
    drop,
    keep_mask,
    key_of,
    philox,
)
from tests.test_oracle import GPT2, LLAMA, assert_close, assert_finite_differences
from tests.test_oracle_bert import BERT, MODERN, PRE, gradients_of, leaves_of

SEVERAL = Dropout(1234, attention=0.3, hidden=0.2, samples=torch.tensor([70000, 3, 2**32 + 3, 4]))


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        (
            "00000000 00000000 00000000 00000000",
            "00000000 00000000",
            "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
        ),
        (
            "ffffffff ffffffff ffffffff ffffffff",
            "ffffffff ffffffff",
            "408f276d 41c83b0e a20bc7c6 6d5451fd",
        ),
        (
            "243f6a88 85a308d3 13198a2e 03707344",
            "a4093822 299f31d0",
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_known_answers_of_random123(counter, key, answer):
    counter, key, answer = (
        [int(word, 16) for word in text.split()] for text in (counter, key, answer)
    )
    assert philox(np.array([counter]), tuple(key)).tolist() == [answer]


def test_the_documents_example():
    key = key_of(1234)
    assert key == (0xE103FA1D, 0x106D993D)
    words = philox(np.array([[108, 10, 70000, 1114112]]), key)[0].tolist()
    assert words == [0x49E3754B, 0x1D08A425, 0xFF258373, 0xC113EC6A]
    for p, stays in ((0.1, True), (0x49E3754B / 2**32, True), (0x49E3754C / 2**32, False)):
        keep = keep_mask(
            1234, 2, AFTER_ATTENTION, torch.tensor([5, 70000]), rows=11, columns=301, p=p
        )
        assert keep.shape == (2, 11, 301) and keep[1, 10, 300].item() == stays


@pytest.mark.parametrize(
    ("layer", "site", "sample", "row", "column", "counter", "word"),
    [
        (0, EMBEDDING, 0, 0, 0, (0, 0, 0, 3 << 16), 0),
        (0, AFTER_MLP, 9, 1, 127, (63, 1, 9, 2 << 16), 1),
        (0, AFTER_MLP, 9, 1, 128, (0, 1, 9, 2 << 16), 2),
        (5, ATTENTION_WEIGHTS, 3 * 2**32 + 5, 2, 256 + 255, (127, 2, 5, (40 << 16) + 3), 3),
        (8191, AFTER_ATTENTION, 2**48 - 1, 0, 3, (3, 0, 2**32 - 1, (65529 << 16) + 2**16 - 1), 0),
    ],
)
def test_elements_by_their_counters(layer, site, sample, row, column, counter, word):
    """An element is dropped as soon as p passes its word."""
    value = int(philox(np.array([counter]), key_of(-7))[0, word])
    for threshold, stays in ((value, True), (value + 1, False)):
        keep = keep_mask(
            -7, layer, site, torch.tensor([sample]), row + 1, column + 1, threshold / 2**32
        )
        assert keep[0, row, column].item() == stays


def test_drop_keeps_the_expectation_and_uses_the_sites_probability():
    """Of N elements p N are dropped, within 5 standard deviations; those kept make up for
    them."""
    x = torch.full((16, 64, 300), 3.0, dtype=torch.float64)
    for site in (ATTENTION_WEIGHTS, AFTER_ATTENTION, AFTER_MLP, EMBEDDING):
        p = 0.3 if site == ATTENTION_WEIGHTS else 0.2
        y = drop(x, replace(SEVERAL, samples=None), 1, site)
        within = 5 * (p * (1 - p) / x.numel()) ** 0.5
        assert (y == 0).double().mean().item() == pytest.approx(p, abs=within)
        assert y.mean().item() == pytest.approx(3.0, abs=3.0 * within / (1 - p))
        assert y[y != 0].unique().tolist() == pytest.approx([3.0 / (1 - p)], rel=1e-15)
    assert drop(x, None, 1, EMBEDDING) is x
    assert torch.equal(drop(x, Dropout(1), 1, EMBEDDING), x)
    with pytest.raises(ValueError, match=r"\(4,\) sample numbers for 16 rows"):
        drop(x, SEVERAL, 1, EMBEDDING)


def drop_as_documented(monkeypatch, shape: Shape, dropout: Dropout) -> list[tuple[int, int]]:
    """torch's dropout drops the elements of the next site in the model; returns the sites still
    to come."""
    layers = range(shape.layers)
    sites = [(i, site) for i in layers for site in (ATTENTION_WEIGHTS, AFTER_ATTENTION, AFTER_MLP)]
    sites.insert(0, (0, EMBEDDING))

    def drop_here(
        x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> torch.Tensor:
        layer, site = sites.pop(0)
        assert training and p == (
            dropout.attention if site == ATTENTION_WEIGHTS else dropout.hidden
        )
        rows = (
            x[0].numel() // x.shape[-1]
        )  # [r, s, h], or [r, n, s, s] whose rows count through the heads
        keep = keep_mask(dropout.seed, layer, site, dropout.samples, rows, x.shape[-1], p)
        return x * keep.reshape(x.shape) / (1 - p)

    monkeypatch.setattr(torch.nn.functional, "dropout", drop_here)
    return sites


def their_gpt2_loss(params: Parameters, data: oracle.Batch) -> torch.Tensor:
    hidden = SEVERAL.hidden
    model = test_oracle.gpt2_model(
        GPT2, attn_pdrop=SEVERAL.attention, resid_pdrop=hidden, embd_pdrop=hidden
    ).train()
    tokens, labels, mask = data
    options = {"input_ids": tokens, "use_cache": False}
    scores = torch.func.functional_call(
        model, test_oracle.gpt2_from_oracle(params, GPT2), kwargs=options
    ).logits
    return torch.nn.functional.cross_entropy(scores[mask], labels[mask])


def their_bert_loss(params: Parameters, data: oracle.Batch) -> torch.Tensor:
    probabilities = {
        "attention_probs_dropout_prob": SEVERAL.attention,
        "hidden_dropout_prob": SEVERAL.hidden,
    }
    model = test_oracle_bert.bert_model(BERT, **probabilities).train()
    return test_oracle_bert.their_output(model, params, BERT, data).loss


@pytest.mark.parametrize(
    ("shape", "batch", "their_loss"),
    [(GPT2, test_oracle.batch, their_gpt2_loss), (BERT, test_oracle_bert.batch, their_bert_loss)],
    ids=["gpt2", "bert"],
)
def test_loss_and_gradients_equal_hugging_face(monkeypatch, shape, batch, their_loss):
    """Its models drop the elements of docs/randomness.md at its own sites, in which the oracle's
    must be as well."""
    pytest.importorskip("transformers")
    params, data = oracle.random_parameters(shape), batch(shape, rows=4)
    leaves, bound = leaves_of(params), test_oracle_bert.tolerance(shape, data[0].numel())
    value, gradients = oracle.loss_and_gradients(params, shape, *data, dropout=SEVERAL)
    sites = drop_as_documented(monkeypatch, shape, SEVERAL)
    theirs = their_loss(leaves, data)
    assert not sites
    assert value == pytest.approx(theirs.item(), rel=bound)
    assert_close(gradients, gradients_of(theirs, leaves), bound)
    assert abs(value - oracle.loss(params, shape, *data).item()) > 1e-3


@pytest.mark.parametrize(
    "shape", [GPT2, LLAMA, BERT, PRE, MODERN], ids=["gpt2", "llama", "post", "pre", "modern"]
)
def test_gradients_equal_finite_differences(shape):
    batch = test_oracle.batch if shape.architecture == "gpt" else test_oracle_bert.batch
    assert_finite_differences(
        oracle.random_parameters(shape), shape, batch(shape, rows=4), dropout=SEVERAL
    )


@pytest.mark.parametrize("given", [False, True])
def test_training_counts_samples_on(given):
    """With a rate of 0 each step's loss is that of the same weights, under the step's own sample
    numbers."""
    params, batches = (
        oracle.random_parameters(BERT),
        [test_oracle_bert.batch(BERT, seed=seed) for seed in (1, 2)],
    )
    samples = (
        torch.tensor([[5, 1, 7, 2], [9, 9, 0, 3], [4, 8, 6, 11]])
        if given
        else torch.arange(12).reshape(3, 4)
    )
    dropout = replace(SEVERAL, samples=samples if given else None)
    trained = oracle.train(params, BERT, batches, 0.0, steps=3, dropout=dropout)
    steps = zip((batches[0], batches[1], batches[0]), samples)
    expected = [
        oracle.loss(params, BERT, *data, dropout=replace(SEVERAL, samples=s)).item()
        for data, s in steps
    ]
    assert trained.losses == pytest.approx(expected, rel=1e-14)
    assert len({round(value, 6) for value in expected}) == 3
