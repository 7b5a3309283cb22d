"""Rotary position embedding (Su et al. 2021, equation 34).

Element i of a head forms a pair with element i + d/2, as in GPT-NeoX and Llama.
"""

import torch
from torch import Tensor

from megalite.kernels.rotary import rotary

RotaryTable = tuple[Tensor, Tensor]
"""cos and sin of the angle of each position and component: each [s, 1, 1, d], or [s, b, 1, d] where
positions differ between samples."""


def rotary_table(length: int, head_size: int, base: float, dtype, device) -> RotaryTable:
    """cos and sin of position * base^(-2i/d), each [s, 1, 1, d].

    The d/2 frequencies are repeated for the second half of a head.
    """
    # Angles in fp64: in fp32 a position of 100k is off by 1e-2 radians at the highest frequency.
    doubled = torch.arange(0, head_size, 2, dtype=torch.float64, device=device)
    frequencies = base ** -(doubled / head_size)
    positions = torch.arange(length, dtype=torch.float64, device=device)
    angles = torch.outer(positions, frequencies)
    angles = torch.cat([angles, angles], dim=-1)[:, None, None, :]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def table_at(table: RotaryTable, positions: Tensor) -> RotaryTable:
    """Rows of a rotary table at positions [b, s] below its length: cos and sin, [s, b, 1, d]."""
    cos, sin = table
    return cos[positions.t(), 0], sin[positions.t(), 0]


def rotate(x: Tensor, table: RotaryTable) -> Tensor:
    """Rotate queries or keys [s, b, n, d] by the angles of their positions."""
    return rotary(x, *table)
