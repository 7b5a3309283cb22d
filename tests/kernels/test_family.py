"""GELU, SwiGLU, RMSNorm, rotary embedding and cross-entropy as operators, with either body.

That the kernels compute the right numbers for all lengths is shown in test_kernels.py; here it is
that the operators call them rightly, and are operators as torch wants them.
"""

import pytest
import torch
from torch.nn import functional

from megalite.kernels.activation import bias_gelu, bias_gelu_backward, swiglu, swiglu_backward
from megalite.kernels.cross_entropy import cross_entropy_gradient_, cross_entropy_statistics
from megalite.kernels.norm import rms_norm, rms_norm_backward, rms_norm_forward
from megalite.kernels.rotary import rotary, turn

UNITS = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}
DTYPES = pytest.mark.parametrize("dtype", UNITS)
ROUNDINGS = 200
"""More than any result here has, of numbers up to the largest: a wrong argument shows as a
difference of order 1."""


def draw(*shape, dtype=torch.float32, seed=1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def table(length: int, d: int, dtype, batch: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    angles = draw(length, batch, 1, d // 2, dtype=torch.float64, seed=8)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def plain_rotary(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def plain_swiglu(x):
    gate, up = x.chunk(2, dim=-1)
    return functional.silu(gate) * up


def plain_rms_norm(x, weight, residual=None):
    x = x if residual is None else x + residual
    return functional.rms_norm(x, weight.shape, weight, 1e-5) + (0 if residual is None else 3 * x)


def fused_rms_norm(x, weight, residual=None):
    y, s = rms_norm(x, weight, 1e-5, residual)
    return y + (0 if residual is None else 3 * s)


def inputs(name: str, dtype) -> tuple:
    """(fused, plain, tensors that have gradients, others)."""
    x = draw(6, 3, 70, dtype=dtype)
    return {
        "gelu": (
            lambda x: bias_gelu(x, None),
            lambda x: functional.gelu(x, approximate="tanh"),
            (x,),
            (),
        ),
        "bias_gelu": (
            bias_gelu,
            lambda x, b: functional.gelu(x + b, approximate="tanh"),
            (x, draw(70, dtype=dtype, seed=2)),
            (),
        ),
        "swiglu": (swiglu, plain_swiglu, (x,), ()),
        "rms_norm": (fused_rms_norm, plain_rms_norm, (x, draw(70, dtype=dtype, seed=2)), ()),
        "rms_norm of a sum": (
            fused_rms_norm,
            plain_rms_norm,
            (x, draw(70, dtype=dtype, seed=2), draw(6, 3, 70, dtype=dtype, seed=3)),
            (),
        ),
        "rotary": (rotary, plain_rotary, (draw(6, 3, 4, 10, dtype=dtype),), table(6, 10, dtype)),
        "rotary of packed rows": (
            rotary,
            plain_rotary,
            (draw(6, 3, 4, 10, dtype=dtype),),
            table(6, 10, dtype, 3),
        ),
    }[name]


NAMES = pytest.mark.parametrize(
    "name",
    [
        "gelu",
        "bias_gelu",
        "swiglu",
        "rms_norm",
        "rms_norm of a sum",
        "rotary",
        "rotary of packed rows",
    ],
)


def strided(x: torch.Tensor, how: str) -> torch.Tensor:
    """The same values: as they are, transposed in memory, or every second of the last dim."""
    if how == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    return torch.stack([x, x], dim=-1)[..., 0] if how == "spread" else x


@DTYPES
@NAMES
@pytest.mark.parametrize("strides", ["contiguous", "transposed", "spread"])
def test_outputs_and_gradients_are_those_of_plain_torch_in_float64(body, name, dtype, strides):
    fused, plain, tensors, others = inputs(name, dtype)
    own = [strided(t, strides).requires_grad_() for t in tensors]
    exact = [t.double().requires_grad_() for t in tensors]
    y, expected = fused(*own, *others), plain(*exact, *(t.double() for t in others))
    grad = strided(draw(*y.shape, dtype=dtype, seed=9), strides)
    pairs = zip(
        torch.autograd.grad(y, own, grad), torch.autograd.grad(expected, exact, grad.double())
    )
    sums = UNITS[torch.float64 if dtype == torch.float64 else torch.float32]
    for got, wanted in [(y, expected), *pairs]:
        assert got.dtype == dtype and got.shape == wanted.shape
        # A gradient summed over 18 rows has a rounding to the type for each of them, one for itself
        # and one for y.
        allowed = ROUNDINGS * sums + 20 * UNITS[dtype]
        assert (got - wanted).abs().max() <= allowed * wanted.abs().max()


OPERATORS = {
    "bias_gelu": lambda: (bias_gelu, (draw(6, 70).requires_grad_(), draw(70).requires_grad_())),
    "gelu": lambda: (bias_gelu, (draw(6, 70).requires_grad_(), None)),
    "bias_gelu_backward": lambda: (bias_gelu_backward, (draw(6, 70), draw(6, 70), draw(70))),
    "swiglu": lambda: (swiglu, (draw(6, 70).requires_grad_(),)),
    "swiglu_backward": lambda: (swiglu_backward, (draw(6, 35), draw(6, 70))),
    "swiglu_backward of channels last": lambda: (
        swiglu_backward,
        tuple(draw(2, 3, 4, n).contiguous(memory_format=torch.channels_last) for n in (5, 10)),
    ),
    "rms_norm": lambda: (
        rms_norm_forward,
        (draw(6, 70).requires_grad_(), draw(70).requires_grad_(), 1e-5, None),
    ),
    "rms_norm of a sum": lambda: (
        rms_norm_forward,
        (draw(6, 70).requires_grad_(), draw(70), 1e-5, draw(6, 70)),
    ),
    "rms_norm_backward": lambda: (
        rms_norm_backward,
        (draw(6, 70), draw(6, 70), draw(6, 70), draw(70), draw(6).abs()),
    ),
    "rotary": lambda: (
        turn,
        (draw(6, 3, 4, 10).requires_grad_(), *table(6, 10, torch.float32), False),
    ),
    "rotary of a part": lambda: (
        turn,
        (draw(6, 3, 4, 20)[..., :10], *table(6, 10, torch.float32), True),
    ),
    "statistics": lambda: (
        cross_entropy_statistics,
        (draw(6, 3, 70), torch.arange(18).view(6, 3), 60),
    ),
    "gradient": lambda: (
        cross_entropy_gradient_,
        (draw(6, 70), torch.arange(6), 60, draw(6).abs() + 5, draw(6, seed=3)),
    ),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(body, name):
    operator, arguments = OPERATORS[name]()
    torch.library.opcheck(operator, arguments)


@NAMES
def test_they_compile_whole(body, name):
    torch._dynamo.reset()
    fused, _, tensors, others = inputs(name, torch.float32)
    tensors = [t.requires_grad_() for t in tensors]

    def step(*args):
        return fused(*args).square().sum()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    expected = torch.autograd.grad(step(*tensors, *others), tensors)
    for a, b in zip(torch.autograd.grad(compiled(*tensors, *others), tensors), expected):
        torch.testing.assert_close(a, b)


@NAMES
def test_gradients_are_derivatives(name):
    fused, _, tensors, others = inputs(name, torch.float64)
    tensors = [
        (t[:2, :2, :6] if t.dim() == 3 else t[:6] if t.dim() == 1 else t[:2, :2, :2])
        for t in tensors
    ]
    others = [t[:2, :2] for t in others]
    assert torch.autograd.gradcheck(
        lambda *t: fused(*t, *others), [t.clone().requires_grad_() for t in tensors]
    )


@DTYPES
def test_cross_entropy_of_a_vocabulary_in_two_parts(body, dtype):
    """Two ranks' parts with padding, put together as ranks do, against the whole in float64; the
    gradient in place."""
    whole, labels = (
        3 * draw(5, 2, 50, dtype=dtype),
        torch.tensor([[0, 49], [20, 29], [30, 31], [1, 2], [10, 40]]),
    )
    parts = [
        torch.cat([whole[..., part], draw(5, 2, 6, dtype=dtype)], -1)
        for part in (slice(0, 30), slice(30, 50))
    ]
    results = [
        cross_entropy_statistics(x, labels - s, n) for x, s, n in zip(parts, (0, 30), (30, 20))
    ]
    top = torch.maximum(results[0][0], results[1][0])
    total = sum(t * (own - top).exp() for own, t, _ in results)
    lse = top + total.log()
    exact = whole.double().requires_grad_()
    losses = functional.cross_entropy(exact.flatten(0, 1), labels.flatten(), reduction="none").view(
        5, 2
    )
    unit = UNITS[torch.float64 if dtype == torch.float64 else torch.float32]
    assert (
        lse - sum(t for *_, t in results) - losses
    ).abs().max() < ROUNDINGS * unit * lse.abs().max()

    weight = draw(5, 2, dtype=lse.dtype, seed=4)
    (expected,) = torch.autograd.grad(losses, exact, weight.double())
    for x, start, n in zip(parts, (0, 30), (30, 20)):
        cross_entropy_gradient_(x, labels - start, n, lse, weight)
        difference = (x[..., :n] - expected[..., start : start + n]).abs().max()
        assert (
            difference < (ROUNDINGS * unit + UNITS[dtype]) * weight.abs().max()
            and (x[..., n:] == 0).all()
        )


@pytest.mark.parametrize("valid", [1, 19, 20, 33])
def test_the_gradient_of_padding_is_zero_whatever_the_lse(body, valid):
    logits, labels = draw(4, 40), torch.tensor([0, 5, 5, 39])
    lse = torch.tensor([float("nan"), float("inf"), -float("inf"), 5.0])
    cross_entropy_gradient_(logits, labels, valid, lse, torch.ones(4))
    assert (logits[:, valid:] == 0).all() and logits[0, :valid].isnan().all()
    assert logits[1, 6:valid].eq(0).all() and logits[2, :valid].isinf().all()


def test_cross_entropy_copies_no_logits(body):
    """What is returned has a number for each row; with the native body nothing else is
    allocated."""
    logits = draw(4, 3, 1000, dtype=torch.bfloat16)
    for result in cross_entropy_statistics(logits, torch.zeros(4, 3, dtype=torch.int64), 900):
        assert result.shape == (4, 3) and result.dtype == torch.float32
    if body == "native":
        with torch.profiler.profile(
            profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]
        ) as trace:
            cross_entropy_statistics(logits, torch.zeros(4, 3, dtype=torch.int64), 900)
        assert max(event.self_cpu_memory_usage for event in trace.events()) < logits.numel()


def test_wrong_arguments_are_refused_with_words(body):
    x, heads, labels = draw(6, 70), draw(6, 3, 4, 10), torch.zeros(6, dtype=torch.int64)
    cos, sin = table(6, 10, torch.float32)
    bad = [
        (TypeError, "floating-point", lambda: bias_gelu(x.long(), None)),
        (ValueError, r"the bias is \(69,\), not \(70,\)", lambda: bias_gelu(x, draw(69))),
        (TypeError, "the bias is torch.float64 on cpu", lambda: bias_gelu(x, draw(70).double())),
        (
            ValueError,
            r"gate and up in one tensor \[..., 2 f\], not \(6, 69\)",
            lambda: swiglu(x[:, 1:]),
        ),
        (ValueError, r"the weight is \(60,\), not \(70,\)", lambda: rms_norm(x, draw(60), 1e-5)),
        (
            TypeError,
            "the residual is torch.float64",
            lambda: rms_norm(x, draw(70), 1e-5, x.double()),
        ),
        (ValueError, "d even", lambda: rotary(heads[..., 1:], cos[..., 1:], sin[..., 1:])),
        (
            ValueError,
            r"sin \(5, 1, 1, 10\) does not broadcast to \(6, 3, 4, 10\)",
            lambda: rotary(heads, cos, sin[1:]),
        ),
        (TypeError, "cos is torch.float64", lambda: rotary(heads, cos.double(), sin)),
        (ValueError, "with valid = 71", lambda: cross_entropy_statistics(x, labels, 71)),
        (
            ValueError,
            r"labels are int64 \(6,\)",
            lambda: cross_entropy_statistics(x, labels[1:], 70),
        ),
        (
            ValueError,
            "lse is torch.float64",
            lambda: cross_entropy_gradient_(x, labels, 70, draw(6).double(), draw(6)),
        ),
    ]
    for kind, words, call in bad:
        with pytest.raises(kind, match=words):
            call()


@pytest.mark.parametrize("which", [0, 1])
def test_tables_that_want_a_gradient_are_refused(body, which):
    heads, tables = draw(6, 3, 4, 10), table(6, 10, torch.float32)
    expected = rotary(heads, *tables)
    tables[which].requires_grad_()
    with pytest.raises(ValueError, match="no gradient for cos and sin"):
        rotary(heads, *tables)
    with torch.no_grad():
        assert torch.equal(rotary(heads, *tables), expected)


@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8), (2, 3, 0)])
def test_empty_tensors(body, shape):
    x, weight = torch.empty(shape, requires_grad=True), torch.ones(shape[-1], requires_grad=True)
    for y in (
        bias_gelu(x, weight),
        rms_norm(x, weight, 1e-5, x)[0],
        swiglu(x),
        rms_norm(x, weight, 1e-5)[0],
    ):
        y.sum().backward()
        assert y.shape[:-1] == shape[:-1] and x.grad.shape == shape
    heads = torch.empty(*shape[:2], 2, shape[2])
    assert rotary(heads, heads[:, :, :1], heads[:, :, :1]).shape == heads.shape
    labels = torch.zeros(shape[:2], dtype=torch.int64)
    top, total, target = cross_entropy_statistics(x.detach(), labels, shape[-1])
    assert top.shape == total.shape == target.shape == shape[:2]
