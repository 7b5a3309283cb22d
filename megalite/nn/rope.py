"""Rotary position embedding (Su et al. 2021, equation 34).

Element i of a head forms a pair with element i + d/2, as in GPT-NeoX and Llama.
"""

from math import pi

import torch
from torch import Tensor

from megalite.kernels.rotary import rotary
from megalite.nn.config import ModelConfig

RotaryTable = tuple[Tensor, Tensor]
"""cos and sin of the angle of each position and component: each [s, 1, 1, d], or [s, b, 1, d] where
positions differ between samples."""


def rotary_frequencies(head_size: int, base: float, device="cpu") -> Tensor:
    """The angle between two positions, in radians, of each pair of components: base^(-2i/d), fp64
    [d/2]."""
    doubled = torch.arange(0, head_size, 2, dtype=torch.float64, device=device)
    return base ** -(doubled / head_size)


def llama3_frequencies(
    frequencies: Tensor, *, factor: float, low: float, high: float, length: int
) -> Tensor:
    """Frequencies for sequences longer than `length`, as Llama 3.1 scales them (Grattafiori et al.
    2024; formula of its published code).

    Those with more than `high` turns in `length` positions are kept, those with fewer than `low`
    divided by `factor`. In between, both are mixed in proportion to the turns.
    """
    turns = length * frequencies / (2 * pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / factor


def model_frequencies(model: ModelConfig, device) -> Tensor:
    """Rotary frequencies as a model has them, scaled if it says so: fp64 [d/2]."""
    frequencies = rotary_frequencies(model.head_size, model.rotary_base, device)
    if model.rope_scaling == "none":
        return frequencies
    return llama3_frequencies(
        frequencies,
        factor=model.rope_scaling_factor,
        low=model.rope_low_freq_factor,
        high=model.rope_high_freq_factor,
        length=model.rope_original_max_position_embeddings,
    )


def rotary_table(length: int, frequencies: Tensor, dtype: torch.dtype) -> RotaryTable:
    """cos and sin of position * frequency, each [s, 1, 1, d], on the device of the frequencies.

    The d/2 frequencies are repeated for the second half of a head.
    """
    # Angles in fp64: in fp32 a position of 100k is off by 1e-2 radians at the highest frequency.
    positions = torch.arange(length, dtype=torch.float64, device=frequencies.device)
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
