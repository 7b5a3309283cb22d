"""Dropout that no layout can change: an element is dropped or kept according to its position.

The format, fixed for good (docs/randomness.md): a tensor is rows of columns. The 32-bit word of
element (row, column) of sample i at site (layer, site) is word `column // 64 % 4` of the Philox
4x32-10 counter

    (column // 256 * 64 + column % 64,
     row,
     i mod 2^32,
     i // 2^32 + 2^16 * (8 * layer + site) mod 2^32)

under the key of the seed; the element is dropped when the word is below round(p * 2^32). 64
neighbouring columns use the same word of 64 neighbouring counters, so that a vector unit never has
to interleave the four words (a planar layout).

`keep_mask` is the reference in plain PyTorch, on any device. Only the positions are kept for the
backward.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from megalite.kernels import native
from megalite.kernels.philox import KEY_STEPS, MASK, MULTIPLIERS, ROUNDS

_BLOCK = 1 << 14
"""Counters made at a time on the CPU: their int64 words stay in a core's cache."""
_LARGE_BLOCK = 1 << 22
"""On other devices, where starting an operation costs more than memory traffic."""


class Dropout(NamedTuple):
    """Dropout of a tensor [..., columns]: its probability, and the positions of the rows."""

    rows: Tensor
    """Row numbers, int64, broadcasting to the leading dims."""
    samples: Tensor
    """Sample numbers, int64, broadcasting to the leading dims."""
    site_id: int
    key: tuple[int, int]
    p: float

    @property
    def drops(self) -> bool:
        """Whether some 32-bit word is below the threshold."""
        return self.rows is not None and round(self.p * 2**32) > 0

    def keep(self, x: Tensor) -> Tensor:
        """Which elements of x are kept, of the shape of x."""
        rows, samples, site_id, key, p = self
        mask = keep_mask(rows, samples, x.shape[-1], site_id=site_id, key=key, p=p)
        return mask.expand(x.shape)

    def for_kernels(self, x: Tensor) -> dict[str, Tensor | int | float | None]:
        """The kernels' arguments: row and sample numbers, where and under which key, the largest
        32-bit word that is dropped, and the factor 1 / (1 - p) of what is kept."""
        if self.p == 0:
            return dict(rows=None, samples=None, place=0, key0=0, key1=0, limit=0, factor=1.0)
        key0, key1 = self.key
        return dict(
            rows=_row_numbers(self.rows, x.shape[:-1]),
            samples=_row_numbers(self.samples, x.shape[:-1]),
            place=self.site_id,
            key0=key0 & MASK,
            key1=key1 & MASK,
            limit=round(self.p * 2**32) - 1,
            factor=1 / (1 - self.p),
        )


def _row_numbers(numbers: Tensor, leading: torch.Size) -> Tensor:
    """Row or sample numbers, broadcast to the leading dims of a tensor: a view [i, j, k] where
    there are up to 3."""
    numbers = numbers.expand(leading)
    if len(leading) > 3:
        return numbers.reshape(1, 1, -1)
    return numbers.view(*[1] * (3 - len(leading)), *leading)


def site_id(layer: int, site: int) -> int:
    """The number of a dropout site in the counter: 8 * layer + site.

    Raises ValueError unless 0 <= site < 8 and 0 <= layer < 8192.
    """
    if not 0 <= site < 8 or not 0 <= layer < 8192:
        raise ValueError(
            f"dropout has sites 0..7 of layers 0..8191, not site {site} of layer {layer}"
        )
    return 8 * layer + site


def _philox(x0: Tensor, x1: Tensor, x2: Tensor, x3: Tensor, key: tuple[int, int]):
    """Philox 4x32-10 (Salmon et al. 2011): four words of a counter to four random words.

    Words are 32-bit values in int64 tensors, which broadcast.
    """
    for i in range(ROUNDS):
        k0 = (key[0] + i * KEY_STEPS[0]) & MASK
        k1 = (key[1] + i * KEY_STEPS[1]) & MASK
        # The products wrap around 64 bits; a shift and a mask still give the high words.
        p0 = x0 * MULTIPLIERS[0]
        p1 = x2 * MULTIPLIERS[1]
        x0 = (p1 >> 32).bitwise_and_(MASK) ^ (x1 ^ k0)
        x2 = (p0 >> 32).bitwise_and_(MASK) ^ (x3 ^ k1)
        x1 = p1.bitwise_and_(MASK)
        x3 = p0.bitwise_and_(MASK)
    return x0, x1, x2, x3


def keep_mask(
    rows: Tensor, samples: Tensor, columns: int, site_id: int, key: tuple[int, int], p: float
) -> Tensor:
    """Which elements are kept: bool [..., columns], for row numbers and sample numbers that
    broadcast to [...]."""
    rows, samples = torch.broadcast_tensors(rows, samples)
    shape = rows.shape
    rows = rows.reshape(-1, 1)
    samples = samples.reshape(-1, 1)
    # The four words of the counters: x0 for a row [counters], the others for each row [rows, 1].
    counters = -(-columns // 256) * 64
    x0 = torch.arange(counters, device=rows.device)
    x1 = rows & MASK
    x2 = samples & MASK
    x3 = ((samples >> 32) + (site_id << 16)) & MASK
    threshold = round(p * 2**32)
    count = rows.shape[0]
    keep = torch.empty((count, counters // 64, 4, 64), dtype=torch.bool, device=rows.device)
    # A block of rows at a time; word w of a counter decides about column 64 w of its 256.
    block = _BLOCK if rows.device.type == "cpu" else _LARGE_BLOCK
    step = max(1, block // max(counters, 1))
    for i in range(0, count, step):
        some = slice(i, i + step)
        for w, word in enumerate(_philox(x0, x1[some], x2[some], x3[some], key=key)):
            word = word.expand(-1, counters).view(-1, counters // 64, 64)
            torch.ge(word, threshold, out=keep[some, :, w])
    return keep.view(count, 4 * counters)[:, :columns].reshape(*shape, columns)


def check_dropout(x: Tensor, rows: Tensor | None, samples: Tensor | None, p: float) -> None:
    """Raise ValueError or TypeError unless rows and samples, both or neither, broadcast to x's
    rows, and 0 <= p < 1."""
    if not 0 <= p < 1:
        raise ValueError(f"dropout takes 0 <= p < 1, not {p}")
    if (rows is None) != (samples is None) or (rows is None and p > 0):
        raise ValueError("dropout takes both the rows and the samples of a tensor")
    for name, numbers in (("rows", rows), ("samples", samples)):
        if numbers is None:
            continue
        if numbers.dtype != torch.int64:
            raise TypeError(f"the {name} are of {numbers.dtype}, not int64")
        if numbers.device != x.device:
            raise ValueError(f"the {name} are on {numbers.device}, the tensor is on {x.device}")
        leading = x.shape[:-1]
        if not native.broadcasts(numbers.shape, leading):
            raise ValueError(
                f"{name} {tuple(numbers.shape)} do not broadcast to the rows {tuple(leading)}"
            )


def _output(x, bias, residual, rows, samples, site_id, key0, key1, p) -> Tensor:
    """The empty output of bias_dropout_add. Raises TypeError or ValueError for what it cannot
    take."""
    native.check_floating("dropout", x, "[..., columns]")
    native.check_operand("the bias", bias, x.shape[-1:], x)
    native.check_operand("the residual", residual, x.shape, x)
    check_dropout(x, rows, samples, p)
    return native.empty_like(x)


@native.operator("bias_dropout_add", _output)
def bias_dropout_add(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    rows: Tensor,
    samples: Tensor,
    site_id: int,
    key0: int,
    key1: int,
    p: float,
) -> Tensor:
    """residual + dropout(x + bias): x and residual [..., columns], bias [columns]; bias and
    residual may be None.

    `rows` and `samples` (int64, broadcasting to [...]) say which row of which sample each row of x
    is in the whole model. The result is contiguous.
    """
    y = _output(x, bias, residual, rows, samples, site_id, key0, key1, p)
    dropout = Dropout(rows, samples, site_id, (key0, key1), p)
    if x.numel() == 0:
        return y
    if native.takes(x) and dropout.drops:
        bias = native.contiguous(bias)
        residual = native.as_rows(residual)
        torch.ops.megalite._bias_dropout_add(
            native.as_rows(x), bias, residual, **dropout.for_kernels(x), out=native.as_rows(y)
        )
        return y
    y = x if bias is None else x + bias
    # One rounding: in bf16, 1 / 0.9 itself would be 0.16% too small.
    y = torch.where(dropout.keep(x), y * (1 / (1 - p)), 0)
    return y if residual is None else y.add_(residual)


def _save(ctx, inputs, output):
    _, bias, residual, rows, samples, *ctx.dropout = inputs
    ctx.has_bias = bias is not None
    ctx.has_residual = residual is not None
    ctx.save_for_backward(rows, samples)


def _backward(ctx, grad):
    # Dropout is linear: the gradient of its input is the gradient of its output, dropped alike.
    grad_x = bias_dropout_add(grad, None, None, *ctx.saved_tensors, *ctx.dropout)
    grad_bias = None
    if ctx.has_bias:
        grad_bias = torch.atleast_2d(grad_x).flatten(0, -2).sum(dim=0)
    return grad_x, grad_bias, grad if ctx.has_residual else None, *[None] * 6


bias_dropout_add.register_autograd(_backward, setup_context=_save)
