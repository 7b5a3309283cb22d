"""What the kernels compute, in float64 NumPy, and how far fp32 arithmetic may be from it.

Bounds are those of floating-point arithmetic (Higham, Accuracy and Stability of Numerical Algorithms, chapters 2 to 4),
to first order: UNIT for each rounding, `n` times that for a sum of n numbers.
"""

import numpy as np

from megalite.kernels.philox import philox4x32

UNIT = 2.0**-24
"""Half the distance of 1 to the next fp32 number."""
ROUNDING = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8, "float64": 2.0**-53}
"""The same for the type of the output."""
SMALLEST = {"float32": 2.0**-126, "float16": 2.0**-24, "bfloat16": 2.0**-126, "float64": 2.0**-1022}
"""Below it (normal numbers of fp32 and bf16, any of fp16) a result may be 0."""
EXP = 4
"""Roundings in an exponential of a given argument."""


def kept(dropout, shape) -> np.ndarray:
    """Which elements [i, j, k, columns] the format of docs/randomness.md keeps."""
    rows = np.broadcast_to(dropout.rows, shape[:3])[..., None].astype(np.uint64)
    samples = np.broadcast_to(dropout.samples, shape[:3])[..., None].astype(np.uint64)
    column = np.arange(shape[3], dtype=np.uint64)
    words = (
        column // 256 * 64 + column % 64,
        rows,
        samples & 0xFFFFFFFF,
        ((samples >> 32) + (dropout.place << 16)) & 0xFFFFFFFF,
    )
    counters = np.stack(np.broadcast_arrays(*words), axis=-1).astype(np.uint32)
    which = np.broadcast_to((column // 64 % 4).astype(np.int64), shape)[..., None]
    word = np.take_along_axis(philox4x32(counters, dropout.key), which, axis=-1)[..., 0]
    return word >= round(dropout.p * 2**32)


def visible(shape, mask, causal) -> np.ndarray:
    """Which columns a row sees, [i, j, k, columns]."""
    seen = np.ones(shape, bool) if mask is None else np.broadcast_to(mask, shape).copy()
    return np.tril(seen) if causal else seen


def softmax(x, scale, mask=None, causal=False, dropout=None):
    """(output, lse, bound on the output's error before it is rounded to its type, bound on that of lse)."""
    seen = visible(x.shape, mask, causal)
    with np.errstate(all="ignore"):
        scores = np.where(seen, scale * x, -np.inf)
        top = scores.max(axis=-1, keepdims=True, initial=-np.inf)
        powers = np.exp(scores - np.where(np.isfinite(top), top, 0))
        total = powers.sum(axis=-1, keepdims=True)
        y = np.where(total > 0, powers / total, 0)
        lse = np.where(total > 0, np.log(total) + top, np.inf)[..., 0]
    if dropout is not None:
        y = np.where(kept(dropout, x.shape), y / (1 - dropout.p), 0)
    # The argument of exp is a product less the largest product: an error of 4 roundings of numbers up to the largest
    # score. One such error in the numerator, one in the sum, whose additions come on top.
    largest = np.abs(np.where(seen, scale * x, 0)).max(axis=-1, keepdims=True, initial=0)
    bound = UNIT * (2 * 4 * largest + 2 * EXP + x.shape[-1] + 4)
    lse_bound = (bound[..., 0] + UNIT * (2 * largest[..., 0] + 4)) + UNIT * np.where(np.isfinite(lse), np.abs(lse), 0)
    return y, lse, bound * np.abs(y), lse_bound


def softmax_backward(grad, scale, y=None, x=None, lse=None, mask=None, causal=False, dropout=None):
    """(gradient of x, absolute bound on its error before it is rounded to its type)."""
    bound = 0.0
    if dropout is not None:
        seen = visible(x.shape, mask, causal)
        with np.errstate(all="ignore"):
            y = np.exp(np.where(seen, scale * x, -np.inf) - lse[..., None])
        size = np.abs(np.where(seen, scale * x, 0)).max(axis=-1, keepdims=True, initial=0)
        size = size + np.where(np.isfinite(lse), np.abs(lse), 0)[..., None]
        bound = UNIT * (4 * size + EXP)
        grad = np.where(kept(dropout, x.shape), grad / (1 - dropout.p), 0)
    products = y * grad
    total, magnitude = products.sum(axis=-1, keepdims=True), np.abs(products).sum(axis=-1, keepdims=True)
    dx = scale * y * (grad - total)
    of_sum = (UNIT * (y.shape[-1] + 4) + bound) * magnitude
    return dx, np.abs(scale * y) * (of_sum + (bound + 6 * UNIT) * (np.abs(grad) + np.abs(total)))


def bias_dropout_add(x, bias, residual, dropout):
    """(result, absolute bound on its error before it is rounded to its type)."""
    added = x + (0 if bias is None else bias)
    size = (np.abs(x) + (0 if bias is None else np.abs(bias))) / (1 - dropout.p)
    y = np.where(kept(dropout, x.shape), added / (1 - dropout.p), 0)
    residual = 0 if residual is None else residual
    return y + residual, UNIT * (4 * size + 2 * np.abs(residual))


def assert_close(got, expected, bound, dtype: str) -> None:
    """Every element within `bound` of what is expected, and its rounding to the type; NaN and infinity alike."""
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(got[~finite], expected[~finite])
    bound = np.broadcast_to(bound, expected.shape)[finite]
    allowed = bound + ROUNDING[dtype] * (np.abs(expected[finite]) + bound) + SMALLEST[dtype]
    wrong = np.abs(got[finite] - expected[finite]) > allowed
    assert not wrong.any(), (
        f"{wrong.sum()} of {wrong.size} elements: {got[finite][wrong][:4]} for {expected[finite][wrong][:4]}, "
        f"allowed {allowed[wrong][:4]}"
    )
