"""The kernels' own operators refuse what they would read or write out of bounds, whoever calls
them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megalite.kernels import native
from megalite.kernels.activation import bias_gelu_backward, swiglu_backward
from megalite.kernels.norm import rms_norm_backward
from megalite.kernels.softmax import softmax_backward

pytestmark = pytest.mark.skipif(bool(native.MISSING), reason="needs the native kernels")

ones = torch.ones
own = torch.ops.megalite
NONE = (None, None, 0, 0, 0, 0.0)
SHORT = {
    "softmax without y": lambda: softmax_backward(
        ones(1, 1, 2, 3), torch.zeros(1, 1, 2), None, None, 1.0, None, False, *NONE
    ),
    "softmax's lse": lambda: softmax_backward(
        ones(1, 1, 9, 3), ones(1, 1, 2), ones(1, 1, 9, 3), None, 1.0, None, False, *NONE
    ),
    "softmax's y": lambda: softmax_backward(
        ones(1, 1, 9, 3), ones(1, 1, 9), ones(1, 1, 2, 3), None, 1.0, None, False, *NONE
    ),
    "swiglu": lambda: swiglu_backward(ones(1), ones(4000, 4000)),
    "bias_gelu": lambda: bias_gelu_backward(
        ones(2, dtype=torch.bfloat16), ones(3000, 4000), ones(1)
    ),
    "bias_gelu's dtype": lambda: bias_gelu_backward(ones(3, 4).half(), ones(3, 4), None),
    "bias_gelu's bias": lambda: bias_gelu_backward(ones(3000, 4000), ones(3000, 4000), ones(1)),
    "rms_norm": lambda: rms_norm_backward(ones(1), None, ones(3000, 4000), ones(4000), ones(3000)),
    "rms_norm's weight": lambda: rms_norm_backward(
        ones(30, 4000), None, ones(30, 4000), ones(1), ones(30)
    ),
    "rms_norm's scale": lambda: rms_norm_backward(
        ones(3000, 40), None, ones(3000, 40), ones(40), ones(1)
    ),
    "rotary's output": lambda: own._rotary(*[ones(9, 1, 1, 4)] * 3, False, ones(900, 1, 1, 4)),
    "rotary's table": lambda: own._rotary(
        ones(9, 1, 1, 4), ones(9, 1, 1, 4), ones(2, 1, 1, 4), False, ones(9, 1, 1, 4)
    ),
    "a row number": lambda: own._bias_dropout_add(
        ones(1, 1, 9, 4),
        None,
        None,
        ones(1, 1, 1).long(),
        ones(1, 1, 9).long(),
        0,
        0,
        0,
        5,
        1.0,
        ones(1, 1, 9, 4),
    ),
    "valid": lambda: own._cross_entropy_backward(
        ones(1, 1, 2, 4), ones(2).long(), 5, ones(2), ones(2)
    ),
    "labels": lambda: own._cross_entropy_backward(
        ones(1, 1, 2, 4), ones(2).int(), 4, ones(2), ones(2)
    ),
}


@pytest.mark.parametrize("what", SHORT)
def test_short_arguments_are_refused(what):
    with pytest.raises(
        RuntimeError, match=r"has \d+ elements, not|wrong dtype|needs x|rows and columns|valid is"
    ):
        SHORT[what]()


@pytest.mark.parametrize("columns", [2**31 - 4000, 2**31 + 2, 2**32])
def test_rows_of_too_many_columns_are_refused(columns):
    x = torch.empty(1, dtype=torch.bfloat16).expand(1, 1, 1, columns)
    with pytest.raises(RuntimeError, match="contiguous"):
        own._bias_gelu(x, None, None, x)
    x = torch.empty(1, 1, 1, columns, dtype=torch.bfloat16)  # never touched, so it takes no memory
    with pytest.raises(RuntimeError, match=r"rows of up to 2147479551 columns, not \d+"):
        own._bias_gelu(x, None, None, x)


def test_what_a_backward_needs_may_have_any_strides():
    grad, y, lse = torch.randn(2, 3, 4, 5), torch.rand(2, 3, 4, 5), torch.rand(2, 3, 4)
    turned = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in (grad, y, lse)]
    results = [
        softmax_backward(g, s, o, None, 1.0, None, False, *NONE)
        for g, o, s in ((grad, y, lse), turned)
    ]
    assert torch.equal(*results)
    scale, weight = torch.rand(2, 3, 4), torch.rand(5)
    for got, expected in zip(
        rms_norm_backward(
            turned[0], None, y, weight, scale.transpose(0, 2).contiguous().transpose(0, 2)
        ),
        rms_norm_backward(grad, None, y, weight, scale),
    ):
        assert torch.equal(got, expected)


def measured(code: str) -> list[int]:
    """The numbers that a fresh process prints, which may use four threads."""
    start = (
        "import os, re, numpy, torch\nfrom pathlib import Path\nfrom megalite.kernels import "
        "native\n"
        "torch.set_num_threads(4); own = torch.ops.megalite\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", start + code],
        cwd=Path(__file__).resolve().parents[2],
        env=os.environ | {"PYTHONPATH": "."},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return [int(word) for word in run.stdout.split()]


THREADS = """
def backward(rows, h):  # NumPy makes the tensors: torch's own threads would be counted too
    new = lambda *shape: torch.from_numpy(numpy.ones(shape, numpy.float32))
    x, group = new(1, 1, rows, h), -(-rows // 64)
    before = len(os.listdir("/proc/self/task"))
    own._rms_norm_backward(x, new(h), x, None, new(rows), group, torch.empty_like(x), torch.empty(-(-rows // group), h))
    print(len(os.listdir("/proc/self/task")) - before)
backward(64, 32)
backward(2048, 512)
"""  # noqa: E501


def test_threads_are_woken_for_work_that_is_worth_it():
    """64 groups of 32 rows each are work for all threads, 64 rows of 32 columns for none but the
    caller's."""
    assert measured(THREADS) == [0, 3]


MEMORY = r"""
x = torch.from_numpy(numpy.ones((1, 1, 1, 1 << 24), numpy.float32))
y = torch.from_numpy(numpy.ones((1, 1, 1, 1 << 24), numpy.float32))
Path("/proc/self/clear_refs").write_text("5")  # from now on the largest size is measured from scratch
size = lambda name: int(re.search(name + r":\s+(\d+)", Path("/proc/self/status").read_text()).group(1))
before = size("VmRSS")
own._bias_gelu(x, None, None, y)
print(size("VmHWM") - before)
"""  # noqa: E501


def test_rows_of_what_keeps_nothing_take_no_memory():
    """In KiB, where the row itself has 65,536."""
    (needed,) = measured(MEMORY)
    assert needed < 8192
