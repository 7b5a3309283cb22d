"""Any input: the right answer, within the bounds of tests.kernels.reference, or an error with
words; never a crash."""

import numpy as np
import pytest
import torch

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from megalite.kernels.dropout import bias_dropout_add  # noqa: E402
from megalite.kernels.philox import key_of  # noqa: E402
from megalite.kernels.softmax import Dropout, softmax  # noqa: E402
from tests.kernels import bare, reference  # noqa: E402
from tests.kernels.test_softmax import TYPES, check_against_float64  # noqa: E402

KEY = key_of(1234, "dropout")
EXAMPLES = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
sizes, dtypes = st.integers(1, 4), st.sampled_from(list(TYPES))
columns = st.one_of(
    st.integers(1, 70), st.integers(250, 300), st.sampled_from([1023, 1024, 1025, 4097])
)
limits = st.sampled_from([(0, 2**32), (0, 2**48), (2**32, 2**63 - 1), (-3, 0), (-(2**63), 0)])
"""Of row and sample numbers: also ones that do not fit in their words of the counter, which are
taken mod 2^32."""
sites = st.one_of(st.integers(0, 2**16 - 1), st.just(2**16 - 1))
probabilities = st.sampled_from([0.0, 1e-12, 2.0**-32, 0.1, 0.5, 0.97])


def strided(x: torch.Tensor, how: int) -> torch.Tensor:
    """The same values at other strides: as they are, transposed in memory, every second of a larger
    tensor."""
    if how == 1:
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if how == 2:
        larger = torch.full((*x.shape[:-1], 2 * x.shape[-1]), 7.0).to(x.dtype)
        larger[..., ::2] = x
        return larger[..., ::2]
    return x


@st.composite
def scores(draw) -> tuple:
    """x, scale, mask, causal, dropout."""
    shape = (draw(sizes), draw(sizes), draw(st.integers(1, 6)), draw(columns))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    spread = draw(st.sampled_from([0.0, 1.0, 8.0]))
    x = torch.from_numpy(rng.standard_normal(shape) * spread).to(draw(dtypes))
    mask = None
    if draw(st.booleans()):
        wanted = [size if draw(st.booleans()) else 1 for size in shape][draw(st.integers(0, 3)) :]
        mask = torch.from_numpy(rng.random(wanted) < draw(st.sampled_from([0.0, 0.2, 0.9])))
        mask = strided(mask, draw(st.integers(0, 2))) if mask.dim() > 1 else mask
    rows = torch.from_numpy(rng.integers(*draw(limits), (1, *shape[1:3])))
    samples = torch.from_numpy(rng.integers(*draw(limits), (shape[0], 1, 1)))
    dropout = Dropout(rows, samples, draw(sites), KEY, draw(probabilities))
    scale, causal = draw(st.sampled_from([0.125, 1.0, -0.7])), draw(st.booleans())
    return strided(x, draw(st.integers(0, 2))), scale, mask, causal, dropout


@EXAMPLES
@given(scores())
def test_softmax(body, arguments):
    x, scale, mask, causal, dropout = arguments
    check_against_float64(x, scale, mask, causal, dropout)


@EXAMPLES
@given(st.data())
def test_bias_dropout_add(body, data):
    leading = data.draw(st.lists(sizes, max_size=5))
    shape = (*leading, data.draw(columns))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    dtype = data.draw(dtypes)
    x, bias, residual = (
        torch.from_numpy(rng.standard_normal(s)).to(dtype) for s in (shape, shape[-1:], shape)
    )
    bias, residual = (
        bias if data.draw(st.booleans()) else None,
        residual if data.draw(st.booleans()) else None,
    )
    if leading:
        x = strided(x, data.draw(st.integers(0, 2)))
    numbers = []
    for _ in range(2):
        size = [n if data.draw(st.booleans()) else 1 for n in leading]
        numbers.append(torch.from_numpy(np.asarray(rng.integers(*data.draw(limits), size))))
    site, p = data.draw(sites), data.draw(probabilities)
    y = bias_dropout_add(x, bias, residual, *numbers, site, *KEY, p)

    four = (int(np.prod(leading, dtype=int)), 1, 1, shape[-1])
    flat = (n.expand(leading).reshape(four[:3]).numpy() for n in numbers)
    x, residual = (None if t is None else t.double().numpy().reshape(four) for t in (x, residual))
    bias = None if bias is None else bias.double().numpy()
    expected, bound = reference.bias_dropout_add(
        x, bias, residual, bare.Dropout(*flat, site, KEY, p)
    )
    # The composition rounds to the type after each of its operations, the kernel once.
    unit = reference.ROUNDING[TYPES[dtype]] / reference.UNIT
    reference.assert_close(y.double().numpy().reshape(four), expected, unit * bound, TYPES[dtype])


junk = st.sampled_from(
    [
        torch.zeros(()),
        torch.zeros(3),
        torch.zeros(2, 1, 3, 4, dtype=torch.bool),
        torch.zeros(2, 2, 3, 4),
        torch.zeros(2, 2, 3, 4, dtype=torch.int64),
        torch.zeros(2, 3, dtype=torch.int64),
        torch.arange(3),
        torch.arange(2),
        torch.zeros(2, 2, 3, 0),
        torch.zeros(0, 2, 3, 4, dtype=torch.bfloat16),
        torch.zeros(2, 2, 3, 4, device="meta"),
        torch.zeros(1, 1, 1, 4).bool(),
        torch.zeros(2, 2, 3, 4, dtype=torch.complex64),
        torch.zeros(2, 2, 3, 1, 4),
    ]
)
maybe_junk = st.one_of(st.none(), junk)


@EXAMPLES
@given(
    junk,
    maybe_junk,
    st.booleans(),
    maybe_junk,
    maybe_junk,
    st.sampled_from([0.0, 0.3, 1.0, -1.0, float("nan")]),
)
def test_nonsense_for_softmax_is_refused_or_computed(body, x, mask, causal, rows, samples, p):
    try:
        y, lse = softmax(x, 1.0, mask, causal, rows, samples, 0, *KEY, p)
    except (TypeError, ValueError) as problem:
        assert str(problem)
    else:
        assert y.shape == x.shape and lse.shape == x.shape[:-1]


@EXAMPLES
@given(
    junk, maybe_junk, maybe_junk, junk, junk, st.sampled_from([0.0, 0.3, 1.0, -1.0, float("nan")])
)
def test_nonsense_for_bias_dropout_add_is_refused_or_computed(
    body, x, bias, residual, rows, samples, p
):
    try:
        y = bias_dropout_add(x, bias, residual, rows, samples, 0, *KEY, p)
    except (TypeError, ValueError) as problem:
        assert str(problem)
    else:
        assert y.shape == x.shape
