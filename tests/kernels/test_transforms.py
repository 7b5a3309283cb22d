"""Under torch.func and dual tensors: vmap is right; what would be wrong is an error."""

import pytest
import torch
from torch.autograd import forward_ad

from megalite.kernels.activation import bias_gelu, swiglu
from megalite.kernels.cross_entropy import cross_entropy_gradient_, cross_entropy_statistics
from megalite.kernels.dropout import bias_dropout_add
from megalite.kernels.norm import rms_norm
from megalite.kernels.rotary import rotary
from megalite.kernels.softmax import scaled_causal_softmax
from tests.kernels.test_family import draw, table

LABELS = torch.zeros(2, 3, 4, dtype=torch.int64)
TABLE = table(2, 6, torch.float32)
OPERATORS = {
    "softmax": lambda x: scaled_causal_softmax(x, 0.5),
    "bias_dropout_add": lambda x: bias_dropout_add(
        x, None, None, torch.arange(4), torch.arange(1), 0, 1, 2, 0.5
    ),
    "bias_gelu": lambda x: bias_gelu(x, None),
    "swiglu": swiglu,
    "rms_norm": lambda x: rms_norm(x, torch.ones(6), 1e-5)[0],
    "rotary": lambda x: rotary(x, *TABLE),
    "cross-entropy": lambda x: cross_entropy_statistics(x, LABELS, 6)[1],
}
"""Of one tensor [2, 3, 4, 6]."""
NAMES = pytest.mark.parametrize("name", OPERATORS)


@NAMES
def test_forward_mode_is_refused(body, name):
    """Where torch gives an operator without a formula for it tangents of zero."""
    x = draw(2, 3, 4, 6)
    with pytest.raises(NotImplementedError, match="has no forward-mode derivative"):
        torch.func.jvp(OPERATORS[name], (x,), (torch.ones_like(x),))
    with (
        forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match="has no forward-mode derivative"),
    ):
        OPERATORS[name](forward_ad.make_dual(x, torch.ones_like(x)))


@NAMES
@pytest.mark.filterwarnings("ignore:.*performance drop")
def test_vmap_is_a_loop(body, name):
    many = draw(5, 2, 3, 4, 6)
    assert torch.equal(
        torch.func.vmap(OPERATORS[name])(many), torch.stack([OPERATORS[name](x) for x in many])
    )


@NAMES
def test_what_torch_func_cannot_do_is_an_error(body, name):
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda x: OPERATORS[name](x).sum())(draw(2, 3, 4, 6))


def test_vmap_of_the_gradient_in_place_is_an_error(body):
    def gradient(x):
        cross_entropy_gradient_(x, LABELS[0], 6, torch.ones(3, 4), torch.ones(3, 4))

    with pytest.raises(RuntimeError, match="Batching rule not implemented"):
        torch.func.vmap(gradient)(draw(2, 3, 4, 6))
