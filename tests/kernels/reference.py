"""What the kernels compute, in float64 NumPy, and how far fp32 arithmetic may be from it.

Bounds are those of floating-point arithmetic (Higham, Accuracy and Stability of Numerical
Algorithms, chapters 2 to 4), to first order: UNIT for each rounding, `n` times that for a sum of n
numbers.
"""

import numpy as np

from megalite.kernels.philox import philox4x32

UNIT = 2.0**-24
"""Half the distance of 1 to the next fp32 number."""
ROUNDING = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8, "float64": 2.0**-53}
"""The same for the type of the output."""
SMALLEST = {"float32": 2.0**-126, "float16": 2.0**-24, "bfloat16": 2.0**-126, "float64": 2.0**-1022}
"""Below it (normal numbers of fp32 and bf16, any of fp16) a result may be 0."""
TINY = 2.0**-126
"""A sigmoid below it may be 0."""
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
        ((samples >> 32) + (dropout.site_id << 16)) & 0xFFFFFFFF,
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
    """(output, lse, bound on the output's error before it is rounded to its type, bound on that of
    lse)."""
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
    # The argument of exp is a product less the largest product: an error of 4 roundings of numbers
    # up to the largest score. One such error in the numerator, one in the sum, whose additions come
    # on top.
    largest = np.abs(np.where(seen, scale * x, 0)).max(axis=-1, keepdims=True, initial=0)
    bound = UNIT * (2 * 4 * largest + 2 * EXP + x.shape[-1] + 4)
    lse_bound = (bound[..., 0] + UNIT * (2 * largest[..., 0] + 4)) + UNIT * np.where(
        np.isfinite(lse), np.abs(lse), 0
    )
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
    total, magnitude = (
        products.sum(axis=-1, keepdims=True),
        np.abs(products).sum(axis=-1, keepdims=True),
    )
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


def _sigmoid(x):
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-x))


def bias_gelu(x, bias, grad=None):
    """(gelu(x + bias), or with `grad` the gradient of its argument; bound on the error)."""
    v = x if bias is None else x + bias
    of_sum = 0 if bias is None else UNIT * np.abs(v)
    c, k = 2 * np.sqrt(2 / np.pi), 0.044715
    argument = c * (v + k * v**3)
    s = _sigmoid(argument)
    of_sigmoid = UNIT * (
        8 * np.abs(argument) * (1 - s) + EXP + 4
    )  # relative: 8 roundings in the argument
    if grad is None:
        return v * s, np.abs(v) * (
            s * of_sigmoid + TINY
        ) + 1.2 * of_sum  # 1.2: no slope of gelu is steeper
    steep = np.abs(v) * c * (1 + 3 * k * v**2) * (s + TINY / UNIT)
    bound = (
        TINY
        + s * of_sigmoid
        + steep * ((1 - s) * (of_sigmoid + 8 * UNIT) + s * of_sigmoid + 2 * UNIT)
        + of_sum
    )
    return grad * (s + v * s * (1 - s) * c * (1 + 3 * k * v**2)), np.abs(grad) * (bound + 4 * UNIT)


def swiglu(x, grad=None):
    """(silu(gate) * up, or with `grad` the gradient of x; bound on the error)."""
    gate, up = np.split(x, 2, axis=-1)
    s = _sigmoid(gate)
    relative = UNIT * (EXP + 8 + 2 * np.abs(gate))
    if grad is None:
        return gate * s * up, np.abs(gate * up) * (s * relative + TINY)
    d_gate, d_up = grad * up * s * (1 + gate * (1 - s)), grad * gate * s
    of_sigmoid = np.abs(grad) * (s * relative + TINY)
    bounds = of_sigmoid * np.abs(up) * (1 + np.abs(gate)), of_sigmoid * np.abs(gate)
    return np.concatenate([d_gate, d_up], axis=-1), np.concatenate(bounds, axis=-1)


def rms_norm(x, residual, weight, epsilon):
    """(y, s, scale, bound on y's error, bound on that of s)."""
    s = x if residual is None else x + residual
    scale = 1 / np.sqrt((s**2).mean(axis=-1, keepdims=True) + epsilon)
    of_sum = 0 if residual is None else UNIT * np.abs(s)
    y = weight * s * scale
    return y, s, scale[..., 0], np.abs(y) * UNIT * (s.shape[-1] / 2 + 10), of_sum


def rms_norm_backward(s, weight, grad, grad_sum, scale, group):
    """(ds, parts of dw, bounds on the errors of both), from the scale that the forward gave."""
    scale = scale[:, None].astype(np.float64)
    n, d = s * scale, grad * weight
    mean, magnitude = (
        (d * n).mean(axis=-1, keepdims=True),
        np.abs(d * n).mean(axis=-1, keepdims=True),
    )
    ds = scale * (d - n * mean) + (0 if grad_sum is None else grad_sum)
    bound = (
        scale
        * UNIT
        * (8 * (np.abs(d) + np.abs(n * mean)) + (s.shape[-1] + 8) * np.abs(n) * magnitude)
    )
    bound = bound + (0 if grad_sum is None else 2 * UNIT * np.abs(grad_sum))
    starts = np.arange(0, len(s), group)
    parts, sizes = (np.add.reduceat(t, starts, axis=0) for t in (grad * n, np.abs(grad * n)))
    return ds, parts, bound, UNIT * (group + 4) * sizes


def rotary(x, cos, sin, inverse):
    """(x turned, bound on the error)."""
    first, second = np.split(x, 2, axis=-1)
    other = np.concatenate([-second, first], axis=-1) * (-1 if inverse else 1)
    return x * cos + other * sin, 3 * UNIT * (np.abs(x * cos) + np.abs(other * sin))


def cross_entropy(logits, labels, valid):
    """(largest, sum of exp, the label's logit; bound on the error of the sum), each [rows]."""
    x = logits[:, :valid]
    top = x.max(axis=-1)
    total = np.exp(x - top[:, None]).sum(axis=-1)
    here = (labels >= 0) & (labels < valid)
    target = np.where(here, logits[np.arange(len(labels)), np.where(here, labels, 0)], 0)
    return top, total, target, total * UNIT * (4 * np.abs(x).max(axis=-1) + EXP + valid)


def cross_entropy_backward(logits, labels, valid, lse, grad):
    """((softmax - [column is label]) * grad, 0 from `valid` on; bound on the error)."""
    x, lse, grad = (
        logits[:, :valid],
        lse[:, None].astype(np.float64),
        grad[:, None].astype(np.float64),
    )
    p = np.exp(x - lse)
    label = np.arange(logits.shape[1]) == labels[:, None]
    label[:, valid:] = False
    p, size = (
        np.pad(t, ((0, 0), (0, logits.shape[1] - valid))) for t in (p, np.abs(x) + np.abs(lse))
    )
    return (p - label) * grad, np.abs(grad) * UNIT * (p * (2 * size + EXP) + 3 * (p + label))


def assert_close(got, expected, bound, dtype: str) -> None:
    """Every element within `bound` of what is expected, and its rounding to the type; NaN and
    infinity alike."""
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(got[~finite], expected[~finite])
    bound = np.broadcast_to(bound, expected.shape)[finite]
    allowed = bound + ROUNDING[dtype] * (np.abs(expected[finite]) + bound) + SMALLEST[dtype]
    wrong = np.abs(got[finite] - expected[finite]) > allowed
    assert not wrong.any(), (
        f"{wrong.sum()} of {wrong.size} elements: {got[finite][wrong][:4]} for "
        f"{expected[finite][wrong][:4]}, "
        f"allowed {allowed[wrong][:4]}"
    )
