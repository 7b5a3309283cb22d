"""Initial weights: a function of seed, parameter name and element index.

They are the same in every layout and on every device.
"""

import math

import numpy as np
import torch

from megalite.kernels.philox import key_of, philox4x32
from megalite.parallel.boxes import Box

_BLOCK = 1 << 16
"""Counters, of 4 normals each, computed at a time: few enough for the processor's cache."""


def _normals(key: tuple[int, int], first: np.ndarray) -> np.ndarray:
    """Four standard normals from each Philox counter (Box and Muller 1958).

    Counters [n] uint64 -> [n, 4] float64.
    """
    counter = np.zeros((first.size, 4), np.uint32)
    counter[:, 0] = first & np.uint64(0xFFFFFFFF)
    counter[:, 1] = first >> np.uint64(32)
    words = philox4x32(counter, key)
    # In (0, 1), never 0, so that the logarithm is finite.
    uniform = (words.astype(np.float64) + 0.5) * 2.0**-32
    radius = np.sqrt(-2.0 * np.log(uniform[:, :2]))
    angle = 2.0 * math.pi * uniform[:, 2:]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _runs(shape: tuple[int, ...], box: Box) -> tuple[np.ndarray, int]:
    """The flat indices of a box as contiguous runs of equal length.

    Returns the first index of each run, and the length.
    """
    # Fold trailing dims into a run while the box covers them whole.
    dims = len(shape)
    length = 1
    stride = 1
    while dims and length == stride:
        dims -= 1
        length *= box.shape[dims]
        stride *= shape[dims]
    # The start of each run: one for each index of the dims that remain.
    starts = np.zeros(1, np.uint64)
    inner = math.prod(shape[dims:])
    if len(shape) > dims:
        starts += np.uint64(np.ravel_multi_index(box.offset[dims:], shape[dims:]))
    for dim in range(dims - 1, -1, -1):
        rows = np.arange(box.shape[dim], dtype=np.uint64) + np.uint64(box.offset[dim])
        starts = (rows[:, None] * np.uint64(inner) + starts[None, :]).reshape(-1)
        inner *= shape[dim]
    return starts, length


def normal(seed: int, name: str, shape: tuple[int, ...], box: Box) -> np.ndarray:
    """A box of a tensor of standard normals with this global shape: float64, shape box.shape.

    The box must not be empty. Element e of the flattened global tensor is number e % 4 of counter
    e // 4, so any box can be computed without the rest.
    """
    key = key_of(seed, "init", name)
    starts, length = _runs(shape, box)
    out = np.empty((starts.size, length))
    step = max(1, _BLOCK * 4 // length)
    for row in range(0, starts.size, step):
        for column in range(0, length, _BLOCK * 4):
            # The counters that cover the next `size` elements of each of these runs. A run may
            # begin and end inside a counter: `size` elements touch at most size // 4 + 2.
            begin = starts[row : row + step] + np.uint64(column)
            size = min(length - column, _BLOCK * 4)
            counters = (begin // np.uint64(4))[:, None] + np.arange(size // 4 + 2, dtype=np.uint64)
            values = _normals(key, counters.reshape(-1)).reshape(begin.size, -1)
            # A run may start at any of the 4 numbers of its first counter.
            index = (begin % np.uint64(4)).astype(np.int64)[:, None] + np.arange(size)
            block = np.take_along_axis(values, index, axis=1)
            out[row : row + step, column : column + size] = block
    return out.reshape(box.shape)


def initialize(parameters: dict[str, torch.nn.Parameter], seed: int) -> None:
    """Fill parameters as their specs say, in place.

    Values are computed on the host in float64, so that a CPU and a GPU start from the same weights.
    Vocabulary padding is left as it is, zero. Copies of a tied weight are equal, since they have
    one name.
    """
    with torch.no_grad():
        for name, parameter in parameters.items():
            spec = parameter.spec
            if spec.box.numel == 0:
                continue  # a rank with vocabulary padding only
            # Scaled in float64, and rounded once to the parameter's dtype.
            if spec.init == "normal":
                values = torch.from_numpy(normal(seed, name, spec.global_shape, spec.box))
                spec.real(parameter).copy_(values.mul_(spec.std))
            else:
                spec.real(parameter).fill_({"zeros": 0.0, "ones": 1.0}[spec.init])
