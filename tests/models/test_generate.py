"""Sampling: which tokens may come, and that a seed repeats them."""

from itertools import islice

import pytest
import torch

from megalite.models.batch import Microbatch
from megalite.models.generate import choose, generate
from megalite.parallel.layout import ParallelLayout
from tests.layouts import LLAMA, Layout
from tests.tiny import build, context_of

PROMPT = torch.tensor([[5, 100, 7], [250, 1, 1]])
PROBABILITIES = torch.tensor([0.05, 0.4, 0.1, 0.3, 0.15])


@pytest.fixture(scope="module")
def model():
    return build(Layout("llama", shape=LLAMA), init_method_std=0.3).components.model


def sample(model, prompt=PROMPT, count=8, **options) -> torch.Tensor:
    """The new tokens, [b, count]."""
    return torch.stack(list(generate(model, prompt, count, **options)), dim=1)


def drawn(**options) -> set[int]:
    """All that comes in a thousand draws from PROBABILITIES."""
    options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | options
    generator = torch.Generator().manual_seed(3)
    return set(choose(PROBABILITIES.log().expand(1000, 5), generator=generator, **options).tolist())


def test_greedy_takes_the_most_likely_token_again_and_again(model):
    text = PROMPT
    with torch.no_grad():
        for _ in range(8):
            logits = model(None, Microbatch(text))[-1, :, :257]
            text = torch.cat([text, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(sample(model, temperature=0), text[:, 3:])


def test_vocabulary_padding_is_never_drawn():
    """Its logits are 0. With equal rows all others are one number, which for one of the two signs
    is below 0."""
    model = build(Layout("llama", shape=LLAMA)).components.model.stages[0]
    row = model.output.weight.detach()[0].clone()
    for sign in (1, -1):
        with torch.no_grad():
            model.output.weight[:257] = sign * row
        for temperature in (0, 1):
            assert sample(model, temperature=temperature).max() < 257


@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        ({}, {0, 1, 2, 3, 4}),
        ({"top_k": 1}, {1}),
        ({"top_k": 3}, {1, 3, 4}),
        ({"top_k": 9}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.39}, {1}),
        ({"top_p": 0.41}, {1, 3}),
        ({"top_p": 0.69}, {1, 3}),
        ({"top_p": 0.71}, {1, 3, 4}),
        ({"top_k": 2, "top_p": 0.56}, {1}),  # 0.4 / 0.7 = 0.571 of what top-k leaves
        ({"top_k": 2, "top_p": 0.58}, {1, 3}),
        ({"temperature": 0.01}, {1}),
        ({"temperature": 0.0}, {1}),
    ],
    ids=str,
)
def test_which_tokens_may_come(options, tokens):
    assert drawn(**options) == tokens


def test_tokens_come_as_often_as_their_probability_says():
    generator = torch.Generator().manual_seed(3)
    n = 20_000
    logits = PROBABILITIES.log().expand(n, 5)
    for temperature, expected in (
        (1.0, PROBABILITIES),
        (0.5, PROBABILITIES**2 / (PROBABILITIES**2).sum()),
    ):
        counts = choose(logits, temperature, 0, 1.0, generator).bincount(minlength=5) / n
        assert (counts - expected).abs().max() < 5 * 0.5 / n**0.5


def test_a_seed_repeats_its_text_and_another_gives_another(model):
    torch.manual_seed(1)
    first = sample(model, seed=1)
    torch.manual_seed(2)
    assert torch.equal(sample(model, seed=1), first)
    assert not torch.equal(sample(model, seed=2), first)


def test_text_longer_than_the_positions_slides_on():
    """With learned positions nothing else would be possible; the last 16 tokens say how it goes
    on."""
    model = build(init_method_std=0.3).components.model
    tokens = sample(model, count=20, temperature=0)
    text = torch.cat([PROMPT, tokens], dim=1)
    with torch.no_grad():
        last = model(None, Microbatch(text[:, -17:-1]))[-1, :, :257].argmax(-1)
    assert torch.equal(tokens[:, -1], last)


def test_tokens_come_one_at_a_time(model):
    assert len(list(islice(generate(model, PROMPT, 10**9), 3))) == 3


def test_training_goes_on_after_sampling():
    """What sampling leaves in the model, such as its rotary table, must be fit for a backward
    pass."""
    tiny = build(Layout("llama", shape=LLAMA))
    sample(
        tiny.components.model, PROMPT.repeat(1, 5)[:, :13]
    )  # passes by the training length of 16
    tiny.components.model.train()
    assert tiny.train(1).gradient_norm > 0


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"temperature": -1.0}, "temperature -1"),
        ({"top_k": -1}, "top_k -1"),
        ({"top_p": 0.0}, "top_p 0"),
        ({"top_p": 1.1}, "top_p 1.1"),
        ({"prompt": PROMPT[:, :0]}, "the prompt has no tokens"),
    ],
)
def test_what_makes_no_sense_is_refused(model, options, complaint):
    with pytest.raises(ValueError, match=complaint):
        sample(model, **options)


def test_a_model_in_parts_is_refused():
    model = build().components.model
    model.context = context_of(ParallelLayout(tensor=2))
    with pytest.raises(ValueError, match="spread over 2 ranks"):
        sample(model)
