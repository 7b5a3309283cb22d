"""Cross-entropy over a divided vocabulary against torch's over a whole one."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from megalite.nn.loss import vocab_parallel_argmax, vocab_parallel_cross_entropy
from megalite.nn.parameter import ParameterSpec
from megalite.parallel.boxes import Box
from megalite.parallel.collectives import Group
from megalite.parallel.context import ParallelContext
from megalite.parallel.layout import ParallelLayout

VOCABULARY = 11
S, B = 6, 2
LABELS = torch.arange(S * B).view(S, B) % VOCABULARY


def logits_of(scale: float = 1.0, dtype=torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return (scale * torch.randn(S, B, VOCABULARY, generator=generator, dtype=torch.float64)).to(
        dtype
    )


def token_weights() -> torch.Tensor:
    return torch.linspace(0, 2, S * B, dtype=torch.float64).view(S, B)  # one is 0: a masked token


def loss_and_gradient(logits: torch.Tensor, rows: int, rank: int, group: Group):
    """On the rank that holds `rows` entries from rows * rank; what lies behind the vocabulary is
    garbage."""
    start = min(rows * rank, VOCABULARY)
    count = min(rows, VOCABULARY - start)
    local = torch.full((S, B, rows), 1e30).to(logits.dtype)
    local[..., :count] = logits[..., start : start + count]
    spec = ParameterSpec(
        global_shape=(VOCABULARY, 1), box=Box((start, 0), (count, 1)), init="normal"
    )
    leaf = local.requires_grad_()
    losses = vocab_parallel_cross_entropy(leaf.clone(), LABELS, spec, group)
    (losses * token_weights()).sum().backward()
    return losses.detach(), leaf.grad


def on_rank(launch, logits: torch.Tensor, rows: int):
    context = ParallelContext.create(ParallelLayout(tensor=launch.world_size), launch)
    return loss_and_gradient(logits, rows, launch.rank, context.tensor)


def expected(logits: torch.Tensor):
    leaf = logits.double().requires_grad_()
    losses = cross_entropy(leaf.flatten(0, 1), LABELS.flatten(), reduction="none").view(S, B)
    (losses * token_weights()).sum().backward()
    return losses.detach(), leaf.grad


@pytest.mark.parametrize("rows", [11, 16])
def test_one_rank(rows):
    losses, gradient = loss_and_gradient(logits_of(), rows, 0, Group((0,), 0))
    wanted, wanted_gradient = expected(logits_of())
    torch.testing.assert_close(losses, wanted, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(gradient[..., :VOCABULARY], wanted_gradient, rtol=1e-13, atol=1e-13)
    assert not gradient[..., VOCABULARY:].any()


@pytest.mark.parametrize(
    ("ranks", "rows"), [(2, 6), (4, 4), (4, 8)], ids=["2", "4, padded", "4, two of padding only"]
)
def test_divided_vocabulary(pool, ranks, rows):
    results = pool.run(on_rank, ranks, logits_of(), rows)
    wanted, wanted_gradient = expected(logits_of())
    for losses, _ in results:
        torch.testing.assert_close(losses, wanted, rtol=1e-13, atol=1e-13)
    gradient = torch.cat([gradient for _, gradient in results], dim=-1)
    torch.testing.assert_close(gradient[..., :VOCABULARY], wanted_gradient, rtol=1e-13, atol=1e-13)
    assert not gradient[..., VOCABULARY:].any()


def argmax_on_rank(launch, logits: torch.Tensor, rows: int) -> torch.Tensor:
    context = ParallelContext.create(ParallelLayout(tensor=launch.world_size), launch)
    start = min(rows * launch.rank, VOCABULARY)
    count = min(rows, VOCABULARY - start)
    local = torch.full((S, B, rows), 1e30, dtype=logits.dtype)
    local[..., :count] = logits[..., start : start + count]
    spec = ParameterSpec(
        global_shape=(VOCABULARY, 1), box=Box((start, 0), (count, 1)), init="normal"
    )
    return vocab_parallel_argmax(local, spec, context.tensor)


@pytest.mark.parametrize(
    ("ranks", "rows"), [(1, 16), (4, 4), (4, 8)], ids=["1", "4, padded", "4, two of padding only"]
)
def test_the_largest_logit_is_found(pool, ranks, rows):
    """The first of equal ones; what lies behind the vocabulary does not count."""
    logits = logits_of()
    logits[0, 0, [2, 9]] = logits[0, 0].max() + 1
    for found in pool.run(argmax_on_rank, ranks, logits, rows):
        assert torch.equal(found, logits.argmax(dim=-1)) and found[0, 0] == 2


@pytest.mark.parametrize("ranks", [1, 4])
def test_extreme_logits_stay_finite(pool, ranks):
    logits = logits_of(scale=1e4, dtype=torch.float32)
    results = pool.run(on_rank, ranks, logits, -(-VOCABULARY // ranks))
    wanted, wanted_gradient = expected(logits)
    for losses, gradient in results:
        assert gradient.isfinite().all()
        torch.testing.assert_close(losses, wanted.float(), rtol=1e-6, atol=1e-3)
    gradient = torch.cat([gradient for _, gradient in results], dim=-1)[..., :VOCABULARY]
    torch.testing.assert_close(gradient, wanted_gradient.float(), rtol=1e-5, atol=1e-6)


def test_bf16_logits_are_computed_in_fp32():
    """Exactly the loss of those logits in fp32, and a gradient that was rounded once, at the
    end."""
    logits = logits_of(scale=4, dtype=torch.bfloat16)
    alone = Group((0,), 0)
    losses, gradient = loss_and_gradient(logits, 16, 0, alone)
    wanted, wanted_gradient = loss_and_gradient(logits.float(), 16, 0, alone)
    assert losses.dtype == torch.float32 and torch.equal(losses, wanted)
    assert gradient.dtype == torch.bfloat16 and torch.equal(gradient, wanted_gradient.bfloat16())


def test_a_second_backward_is_refused():
    """The gradient is made where the probabilities were saved: they are gone after the first."""
    leaf = logits_of().requires_grad_()
    spec = ParameterSpec(
        global_shape=(VOCABULARY, 1), box=Box.whole((VOCABULARY, 1)), init="normal"
    )
    losses = vocab_parallel_cross_entropy(leaf.clone(), LABELS, spec, Group((0,), 0))
    losses.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.sum().backward()
