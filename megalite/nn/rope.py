"""Rotary position embedding (Su et al. 2021, equation 34), in the form that rotates the two halves
of a head."""

import torch

from megalite.kernels.rotary import rotary


def rotary_table(
    length: int, head_size: int, base: float, dtype, device
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of position * base^(-2i/d), each [s, 1, 1, d] with the d/2 frequencies repeated
    for both halves."""
    # Angles in fp64: in fp32 a position of 100k is off by 1e-2 radians at the highest frequency.
    frequencies = base ** -(
        torch.arange(0, head_size, 2, dtype=torch.float64, device=device) / head_size
    )
    angles = torch.outer(torch.arange(length, dtype=torch.float64, device=device), frequencies)
    angles = torch.cat([angles, angles], dim=-1)[:, None, None, :]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def table_at(
    table: tuple[torch.Tensor, torch.Tensor], positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of a rotary table for positions [b, s] of its length or less: cos and sin, each [s,
    b, 1, d]."""
    cos, sin = (part[positions.t(), 0] for part in table)
    return cos, sin


def rotate(x: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotate queries or keys [s, b, n, d] by their positions: a table [s, 1, 1, d], or [s, b, 1, d]
    of each row's."""
    return rotary(x, *table)
