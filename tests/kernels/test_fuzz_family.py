"""The rest of the family on any shapes and strides, against plain torch in float64; infinities and
NaN as torch has."""

import pytest
import torch

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from megalite.kernels.cross_entropy import cross_entropy_gradient_, cross_entropy_statistics  # noqa: E402
from tests.kernels import test_family as family  # noqa: E402

EXAMPLES = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
KINDS = {
    "gelu": (
        lambda x, w, r: family.bias_gelu(x, w),
        lambda x, w, r: family.functional.gelu(x + w, approximate="tanh"),
    ),
    "swiglu": (lambda x, w, r: family.swiglu(x), lambda x, w, r: family.plain_swiglu(x)),
    "rms_norm": (
        lambda x, w, r: family.fused_rms_norm(x, w),
        lambda x, w, r: family.plain_rms_norm(x, w),
    ),
    "rms_norm of a sum": (family.fused_rms_norm, family.plain_rms_norm),
}
"""(ours, plain) of x [..., columns], a weight or bias [columns] and a residual."""
columns = st.one_of(st.integers(1, 40), st.sampled_from([64, 127, 512, 1500])).map(
    lambda half: 2 * half
)
dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64])


@pytest.mark.parametrize("kind", KINDS)
@EXAMPLES
@given(st.data())
def test_any_shape_and_strides(body, kind, data):
    fused, plain = KINDS[kind]
    leading, dtype = (
        data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)),
        data.draw(dtypes),
    )
    shape, seed = (*leading, data.draw(columns)), data.draw(st.integers(0, 1000))
    how = data.draw(st.sampled_from(["contiguous", "transposed", "spread"]))
    tensors = [
        family.draw(*s, dtype=dtype, seed=seed + i)
        for i, s in enumerate((shape, shape[-1:], shape))
    ]
    own = [family.strided(t, how).requires_grad_() for t in tensors]
    exact = [t.double().requires_grad_() for t in tensors]
    y, expected = fused(*own), plain(*exact)
    grad = family.strided(family.draw(*y.shape, dtype=dtype, seed=seed + 9), how)
    got = torch.autograd.grad(y, own, grad, allow_unused=True)
    wanted = torch.autograd.grad(expected, exact, grad.double(), allow_unused=True)
    rows = y.numel() / y.shape[-1]
    wide = family.UNITS[torch.float64 if dtype == torch.float64 else torch.float32]
    # As in test_family, a rounding to the type for each of the rows that a weight's gradient is
    # summed over.
    allowed = family.ROUNDINGS * wide + (2 + rows) * family.UNITS[dtype]
    for ours, theirs in [(y, expected), *zip(got, wanted)]:
        if theirs is not None:
            # What is summed may be as large as the gradient that comes in, and cancel.
            scale = max(
                theirs.abs().max().item(),
                grad.abs().max().item(),
                1e-3 * expected.abs().max().item(),
            )
            assert ours.dtype == dtype and (ours - theirs).abs().max() <= allowed * scale


@EXAMPLES
@given(st.data())
def test_rotary_of_any_shape_and_strides(body, data):
    """Heads that are a part of a larger tensor, as queries of qkv are; tables of positions,
    samples, or one row."""
    shape = [data.draw(st.integers(1, 5)) for _ in range(3)]
    d, dtype = (
        2 * data.draw(st.one_of(st.integers(1, 40), st.sampled_from([64, 65, 300]))),
        data.draw(dtypes),
    )
    how, seed = (
        data.draw(st.sampled_from(["contiguous", "transposed", "spread"])),
        data.draw(st.integers(0, 1000)),
    )
    whole = family.strided(family.draw(*shape, 2 * d, dtype=dtype, seed=seed), how).requires_grad_()
    table = [size if data.draw(st.booleans()) else 1 for size in shape]
    angles = family.draw(*table, d // 2, dtype=torch.float64, seed=seed + 1)
    angles = torch.cat([angles, angles], dim=-1)
    tables = [family.strided(t.to(dtype), how) for t in (angles.cos(), angles.sin())]
    exact = whole.detach().double().requires_grad_()
    y = family.rotary(whole[..., d // 2 : d // 2 + d], *tables)
    expected = family.plain_rotary(exact[..., d // 2 : d // 2 + d], *(t.double() for t in tables))
    grad = family.strided(family.draw(*shape, d, dtype=dtype, seed=seed + 2), how)
    gradients = (
        torch.autograd.grad(y, whole, grad),
        torch.autograd.grad(expected, exact, grad.double()),
    )
    for ours, theirs in [(y, expected), *zip(*gradients)]:
        scale = max(theirs.abs().max(), whole.abs().max(), grad.abs().max())
        assert (
            ours.dtype == dtype and (ours - theirs).abs().max() <= 4 * family.UNITS[dtype] * scale
        )


@EXAMPLES
@given(st.data())
def test_cross_entropy_of_any_shape(body, data):
    rows, width = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 300))
    valid, dtype = data.draw(st.integers(1, width)), data.draw(dtypes)
    logits = family.draw(rows, width, dtype=dtype, seed=data.draw(st.integers(0, 1000)))
    labels = torch.tensor(
        data.draw(st.lists(st.integers(-width, 2 * width), min_size=rows, max_size=rows))
    )
    here = (labels >= 0) & (labels < valid)
    exact = logits[:, :valid].double()
    top, total, target = cross_entropy_statistics(logits, labels, valid)
    picked = exact.gather(1, labels.clamp(0, valid - 1)[:, None])[:, 0] * here
    unit = family.UNITS[torch.float64 if dtype == torch.float64 else torch.float32]
    assert torch.equal(top.double(), exact.amax(1)) and torch.equal(target.double(), picked)
    sums = (exact - exact.amax(1, keepdim=True)).exp().sum(1)
    assert ((total - sums).abs() <= family.ROUNDINGS * unit * sums).all()
    lse, grad = exact.logsumexp(1).to(top.dtype), torch.linspace(-1, 2, rows).to(top.dtype)
    wanted = (exact - lse.double()[:, None]).exp()
    wanted[here] -= torch.nn.functional.one_hot(labels[here], valid)
    cross_entropy_gradient_(logits, labels, valid, lse, grad)
    error = (logits[:, :valid].double() - wanted * grad.double()[:, None]).abs()
    assert (error <= 4 * (family.ROUNDINGS * unit + family.UNITS[dtype])).all() and not logits[
        :, valid:
    ].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["gelu", "swiglu", "rms_norm"])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_infinities_and_nan_are_what_torch_makes_of_them(body, kind, dtype, value):
    """Where torch in the same type has a number, so have we; where it has none, the same kind of
    none."""
    fused, plain = KINDS[kind]
    x, w = family.draw(4, 70, dtype=dtype), family.draw(70, dtype=dtype, seed=2)
    x[1, 3], x[2, 50] = value, value
    y, expected = fused(x, w, None), plain(x, w, None)
    assert torch.equal(y.isnan(), expected.isnan()) and torch.equal(y.isinf(), expected.isinf())
    assert torch.equal(y[y.isinf()], expected[expected.isinf()])
