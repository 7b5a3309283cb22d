"""The softmax operator: its two bodies against float64, gradients, torch's own checks of operators,
bad input."""

import math

import numpy as np
import pytest
import torch

from megalite.kernels import native
from megalite.kernels.philox import key_of
from megalite.kernels.softmax import (
    Dropout,
    scaled_causal_softmax,
    scaled_masked_softmax,
    scaled_softmax,
    softmax,
    softmax_backward,
)
from tests.kernels import bare, reference

KEY = key_of(1234, "dropout")
TYPES = {
    torch.float64: "float64",
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}


def draw(*shape, dtype=torch.float32, seed=1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).mul(2).to(dtype)


def dropout_of(x: torch.Tensor, p: float = 0.3) -> Dropout:
    b, n, s, _ = x.shape
    return Dropout(torch.arange(n * s).view(n, s), torch.arange(7, 7 + b).view(b, 1, 1), 25, KEY, p)


def check_against_float64(x, scale, mask, causal, dropout) -> None:
    """Output and gradient of one call, each within the bound of tests.kernels.reference."""
    dtype = TYPES[x.dtype]
    x = x.detach().requires_grad_()
    if mask is not None:
        y = scaled_masked_softmax(x, scale, mask, causal, dropout)
    else:
        y = (scaled_causal_softmax if causal else scaled_softmax)(x, scale, dropout)
    numbers = None
    if dropout is not None and dropout.p > 0:
        numbers = bare.Dropout(dropout.rows.numpy(), dropout.samples.numpy(), *dropout[2:])
    options = dict(
        mask=None if mask is None else mask.expand(x.shape).numpy(), causal=causal, dropout=numbers
    )
    exact_scale = scale if x.dtype == torch.float64 else float(np.float32(scale))
    exact, lse, bound, lse_bound = reference.softmax(
        x.detach().double().numpy(), exact_scale, **options
    )
    unit = 1 if x.dtype != torch.float64 else 2.0**-29
    reference.assert_close(y.detach().double().numpy(), exact, unit * bound, dtype)

    grad = draw(*x.shape, dtype=x.dtype, seed=2)
    (dx,) = torch.autograd.grad(y, x, grad)
    if numbers is None:
        expected, bound = reference.softmax_backward(
            grad.double().numpy(), exact_scale, y.detach().double().numpy()
        )
    else:
        expected, bound = reference.softmax_backward(
            grad.double().numpy(), exact_scale, None, x.detach().double().numpy(), lse, **options
        )
        # The operator's own lse has an error, which is one of every probability.
        finite = np.where(np.isfinite(lse_bound), lse_bound, 0)[..., None]
        kept = np.where(
            reference.kept(numbers, x.shape), grad.double().numpy() / (1 - dropout.p), 0
        )
        probability, *_ = reference.softmax(
            x.detach().double().numpy(), exact_scale, options["mask"], causal
        )
        spread = np.abs(kept) + 2 * (probability * np.abs(kept)).sum(-1, keepdims=True)
        bound = bound + finite * abs(scale) * probability * spread
    assert dx.shape == x.shape and dx.dtype == x.dtype
    reference.assert_close(dx.double().numpy(), expected, unit * bound, dtype)


@pytest.mark.parametrize("dtype", TYPES, ids=TYPES.values())
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(
    ("kind", "causal"), [(None, False), (None, True), ("padding", False), ("rows", True)]
)
def test_against_float64(body, dtype, p, kind, causal):
    for columns in (1, 7, 64, 300, 1031):
        x = draw(2, 3, 5, columns, dtype=dtype)
        mask = None
        if kind == "padding":
            mask = (
                torch.arange(columns) < torch.tensor([columns, columns // 2])[:, None, None, None]
            )
        elif kind == "rows":
            mask = draw(2, 1, 5, columns, seed=3) > 0
            mask[0, 0, 2] = False
        check_against_float64(x, 0.25, mask, causal, dropout_of(x, p))


def test_both_bodies_drop_the_same_elements(monkeypatch):
    if native.MISSING:
        pytest.skip(native.MISSING)
    x = draw(2, 3, 40, 700)
    one = scaled_causal_softmax(x, 0.3, dropout_of(x))
    monkeypatch.setattr(native, "DEVICES", ())
    other = scaled_causal_softmax(x, 0.3, dropout_of(x))
    assert torch.equal(one == 0, other == 0) and (one == 0).float().mean() > 0.3


def test_it_is_what_attention_computes():
    """In float64, against torch's attention with a mask, gradients too."""
    q, k, v = (draw(2, 3, 33, 16, dtype=torch.float64, seed=i).requires_grad_() for i in range(3))
    mask = torch.arange(33) < torch.tensor([33, 20])[:, None, None, None]
    ours = scaled_masked_softmax(q @ k.transpose(-1, -2), 16**-0.5, mask, causal=True) @ v
    seen = mask & torch.ones(33, 33, dtype=torch.bool).tril()
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen)
    for a, b in zip(
        (ours, *torch.autograd.grad(ours.square().sum(), (q, k, v))),
        (theirs, *torch.autograd.grad(theirs.square().sum(), (q, k, v))),
    ):
        assert (a - b).abs().max() < 1e-12 * b.abs().max()


def test_rows_that_see_nothing_are_zero_and_have_no_gradient(body):
    for dtype in TYPES:
        x = draw(1, 2, 4, 50, dtype=dtype).requires_grad_()
        mask = torch.ones(1, 1, 4, 50, dtype=torch.bool)
        mask[0, 0, 1] = False
        for dropout in (None, dropout_of(x)):
            y = scaled_masked_softmax(x, 1.0, mask, dropout=dropout)
            (dx,) = torch.autograd.grad(y.square().sum(), x)
            assert (y[:, :, 1] == 0).all() and (dx[:, :, 1] == 0).all()
            assert not y.isnan().any() and not dx.isnan().any() and (y[:, :, 0] != 0).any()


def test_infinity_and_nan_are_those_of_torch(body):
    x = draw(1, 1, 5, 20)
    x[0, 0, 0, 3], x[0, 0, 1, 4], x[0, 0, 2], x[0, 0, 3, 5] = (
        math.nan,
        math.inf,
        -math.inf,
        -math.inf,
    )
    for dtype in (torch.float32, torch.bfloat16):
        ours, theirs = scaled_softmax(x.to(dtype), 1.0), x.to(dtype).softmax(-1)
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert ours[0, 0, 3, 5] == 0


# torch's view of the operator


def operator_arguments(
    p: float, mask: bool, causal: bool, dtype=torch.float32, shape=(2, 3, 5, 70)
) -> tuple:
    x = draw(*shape, dtype=dtype).requires_grad_()
    seen = draw(shape[0], 1, *shape[2:], seed=5) > -1 if mask else None
    if p == 0:
        return x, 0.5, seen, causal
    rows, samples, site, key, p = dropout_of(x, p)
    return x, 0.5, seen, causal, rows, samples, site, *key, p


CASES = pytest.mark.parametrize(
    ("p", "mask", "causal"),
    [(0.0, False, True), (0.0, True, False), (0.3, False, False), (0.3, True, True)],
)


@CASES
def test_opcheck(body, p, mask, causal):
    torch.library.opcheck(softmax, operator_arguments(p, mask, causal))
    x, *rest = operator_arguments(p, mask, causal, torch.bfloat16)
    torch.library.opcheck(softmax, (x.detach().transpose(2, 3).contiguous().transpose(2, 3), *rest))


@CASES
def test_opcheck_of_the_backward(body, p, mask, causal):
    x, *rest = operator_arguments(p, mask, causal)
    y, lse = softmax(x.detach(), *rest)
    scale, mask, causal, *dropout = (*rest, *(None, None, 0, 0, 0, 0.0)[: 9 - len(rest)])
    saved = (None, x.detach()) if p else (y, None)
    # In memory a gradient is as what used the output made it: transposed by the product with it
    # transposed, say.
    for grad in (
        torch.ones_like(y),
        torch.ones_like(y.transpose(2, 3).contiguous()).transpose(2, 3),
    ):
        arguments = (
            grad,
            lse,
            *(None if t is None else torch.empty_like(grad).copy_(t) for t in saved),
        )
        torch.library.opcheck(softmax_backward, (*arguments, scale, mask, causal, *dropout))


@CASES
def test_the_gradient_is_the_derivative(p, mask, causal):
    arguments = operator_arguments(p, mask, causal, torch.float64, (1, 2, 3, 7))
    assert torch.autograd.gradcheck(lambda x: softmax(x, *arguments[1:])[0], arguments[:1])


@CASES
def test_it_compiles_whole(body, p, mask, causal):
    torch._dynamo.reset()
    arguments = operator_arguments(p, mask, causal)

    def step(x, *rest):
        return softmax(x * 2, *rest)[0].square().sum()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    (expected,) = torch.autograd.grad(step(*arguments), arguments[0])
    (got,) = torch.autograd.grad(compiled(*arguments), arguments[0])
    assert torch.equal(got, expected)


def test_what_is_kept_for_the_backward(body):
    """Without dropout the output; with it the scores, which the product before does not keep; and
    small things."""
    x = draw(2, 3, 40, 50).requires_grad_()
    for dropout, big in ((None, 1), (dropout_of(x), 1)):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, kept=kept: kept.append(t) or t, lambda t: t
        ):
            scaled_causal_softmax(x, 0.5, dropout)
        assert sum(t.numel() >= x.numel() for t in kept) == big
        assert sum(t.numel() for t in kept) <= x.numel() + 3 * 240 + 2


# Bad input


def test_wrong_arguments_are_refused_with_words(body):
    x = draw(2, 3, 4, 5)
    dropout = dropout_of(x)
    mask = torch.ones(2, 1, 4, 5, dtype=torch.bool)
    bad = [
        (ValueError, r"\[b, n, s_q, s_k\], not \(4, 5\)", lambda: scaled_softmax(x[0, 0], 1.0)),
        (
            TypeError,
            "floating-point scores, not torch.int64",
            lambda: scaled_softmax(x.long(), 1.0),
        ),
        (TypeError, "torch.float32, not bool", lambda: scaled_masked_softmax(x, 1.0, mask.float())),
        (
            ValueError,
            r"\(2, 1, 4, 4\) does not broadcast",
            lambda: scaled_masked_softmax(x, 1.0, mask[..., 1:]),
        ),
        (ValueError, r"does not broadcast", lambda: scaled_masked_softmax(x, 1.0, mask[None])),
        (
            ValueError,
            "on meta, the scores are on cpu",
            lambda: scaled_masked_softmax(x, 1.0, mask.to("meta")),
        ),
        (ValueError, "0 <= p < 1, not 1", lambda: scaled_softmax(x, 1.0, dropout._replace(p=1.0))),
        (
            TypeError,
            "rows are of torch.int32",
            lambda: scaled_softmax(x, 1.0, dropout._replace(rows=dropout.rows.int())),
        ),
        (
            ValueError,
            r"samples \(3,\) do not broadcast to the rows \(2, 3, 4\)",
            lambda: scaled_softmax(x, 1.0, dropout._replace(samples=torch.arange(3))),
        ),
    ]
    for kind, words, call in bad:
        with pytest.raises(kind, match=words):
            call()


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)])
def test_empty_scores_give_empty_weights(body, shape):
    x = torch.empty(shape, requires_grad=True)
    for dropout in (None, dropout_of(x)):
        y = scaled_causal_softmax(x, 1.0, dropout)
        y.sum().backward()
        assert y.shape == shape and x.grad.shape == shape
