"""The operators on each device that has native kernels, beside their compositions in float64 on the
CPU."""

import pytest
import torch

from megalite.kernels import native
from megalite.kernels.cross_entropy import cross_entropy_gradient_, cross_entropy_statistics
from megalite.kernels.dropout import bias_dropout_add
from megalite.kernels.philox import key_of
from megalite.kernels.softmax import softmax
from tests.kernels.test_family import NAMES, ROUNDINGS, UNITS, draw, inputs

KEY, P = key_of(1234, "dropout"), 0.3
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
COLUMNS = (1, 33, 200, 1024, 1031, 4500)
"""Rows of a part of a warp, of a warp, and of a block."""


@pytest.fixture(params=["cpu", "cuda"])
def device(request) -> str:
    if request.param not in native.DEVICES:
        pytest.skip(f"no native kernels for {request.param}")
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    return request.param


def moved(value, *to):
    """Tensors of a nest of tuples given to `Tensor.to`, those of floats only if it is a dtype; the
    rest as it is."""
    if isinstance(value, tuple):
        return tuple(moved(v, *to) for v in value)
    wanted = isinstance(value, torch.Tensor) and (
        value.is_floating_point() or not isinstance(to[0], torch.dtype)
    )
    return value.to(*to) if wanted else value


def assert_alike(function, tensors: list[torch.Tensor], others: tuple, device: str) -> None:
    """Output and gradients on the device and in float64."""
    dtype = tensors[0].dtype
    own = [t.detach().to(device).requires_grad_() for t in tensors]
    exact = [t.detach().double().requires_grad_() for t in tensors]
    y, expected = (
        function(*own, *moved(others, device)),
        function(*exact, *moved(others, torch.float64)),
    )
    grad = draw(*expected.shape, seed=9).to(dtype)
    gradients = (
        torch.autograd.grad(y, own, grad.to(device)),
        torch.autograd.grad(expected, exact, grad.double()),
    )
    for got, wanted in [(y, expected), *zip(*gradients)]:
        assert got.device.type == device
        allowed = (ROUNDINGS + wanted.shape[-1]) * 2.0**-24 + 20 * UNITS[dtype]
        assert (got.cpu() - wanted).abs().max() <= allowed * wanted.abs().max()


@DTYPES
@pytest.mark.parametrize(
    ("masked", "causal", "dropped"), [(0, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 0)]
)
def test_softmax(device, dtype, masked, causal, dropped):
    for columns in COLUMNS:
        mask = draw(2, 1, 5, columns, seed=3) > -1 if masked else None
        numbers = torch.arange(15).view(3, 5), torch.arange(2).view(2, 1, 1)
        dropout = (*numbers, 25, *KEY, P) if dropped else ()
        others = (0.5, mask, bool(causal), *dropout)
        assert_alike(
            lambda x, *rest: softmax(x, *rest)[0],
            [draw(2, 3, 5, columns, dtype=dtype)],
            others,
            device,
        )


@DTYPES
def test_bias_dropout_add(device, dtype):
    for columns in COLUMNS:
        tensors = [
            draw(*shape, dtype=dtype) for shape in ((6, 3, columns), (columns,), (6, 3, columns))
        ]
        others = (torch.arange(6)[:, None], torch.arange(3), 25, *KEY, P)
        assert_alike(bias_dropout_add, tensors, others, device)


@DTYPES
@NAMES
def test_family(device, dtype, name):
    fused, _, tensors, others = inputs(name, dtype)
    assert_alike(fused, list(tensors), others, device)


@DTYPES
def test_cross_entropy(device, dtype):
    logits, labels = draw(7, 3000, dtype=dtype), torch.tensor([0, 1, 2899, 2900, 2999, -1, 5000])
    grad = draw(7)
    results = cross_entropy_statistics(logits.to(device), labels.to(device), 2900)
    expected = cross_entropy_statistics(logits.double(), labels, 2900)
    for got, wanted in zip(results, expected):
        assert (got.cpu() - wanted).abs().max() <= 4000 * 2.0**-24 * wanted.abs().max()
    lse = (expected[0] + expected[1].log()).float()
    own, exact = logits.to(device), logits.double()
    cross_entropy_gradient_(own, labels.to(device), 2900, lse.to(device), grad.to(device))
    cross_entropy_gradient_(exact, labels, 2900, lse.double(), grad.double())
    assert (own.cpu() - exact).abs().max() <= (
        ROUNDINGS * 2.0**-24 + UNITS[dtype]
    ) * grad.abs().max()
