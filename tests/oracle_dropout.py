"""Dropout by counting, as docs/randomness.md fixes it: read it beside that page. It imports nothing
from megalite.

Each element makes the four words of its counter for itself and takes one of them: slow, and nothing
to get wrong.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

ATTENTION_WEIGHTS, AFTER_ATTENTION, AFTER_MLP, EMBEDDING = range(4)
"""The numbers of the sites."""


@dataclass(frozen=True)
class Dropout:
    """What is dropped, and of which samples the rows are."""

    seed: int
    attention: float = 0.0
    """Probability of attention weights."""
    hidden: float = 0.0
    """Probability everywhere else."""
    samples: Tensor | None = None
    """Number in the run of each row's sample, int64 [r]; for `train` [steps, r]. Unset: rows count
    on from 0."""


def drop(x: Tensor, dropout: Dropout | None, layer: int, site: int) -> Tensor:
    """x [r, rows, columns] after dropout at a site of a layer, by that site's probability; no
    dropout: x."""
    if dropout is None:
        return x
    p = dropout.attention if site == ATTENTION_WEIGHTS else dropout.hidden
    samples = torch.arange(x.shape[0]) if dropout.samples is None else dropout.samples
    if samples.shape != x.shape[:1]:
        raise ValueError(f"{tuple(samples.shape)} sample numbers for {x.shape[0]} rows")
    keep = keep_mask(dropout.seed, layer, site, samples, x.shape[1], x.shape[2], p)
    return torch.where(keep.to(x.device), x * (1 / (1 - p)), 0)


def keep_mask(
    seed: int, layer: int, site: int, samples: Tensor, rows: int, columns: int, p: float
) -> Tensor:
    """Which elements of [r, rows, columns] stay, bool; `samples` is [r]."""
    numbers = (samples.cpu().numpy(), np.arange(rows), np.arange(columns))
    sample, row, column = np.meshgrid(*numbers, indexing="ij")
    place = 8 * layer + site
    counter = [
        column // 256 * 64 + column % 64,
        row,
        sample % 2**32,
        sample // 2**32 + 2**16 * place,
    ]
    words = philox(np.stack(counter, axis=-1), key_of(seed))
    word = np.take_along_axis(words, (column // 64 % 4)[..., None], axis=-1)[..., 0]
    return torch.from_numpy(word >= round(p * 2**32))


def key_of(seed: int) -> tuple[int, int]:
    """The two words of the key that dropout uses under this seed."""
    text = f"i{len(str(seed))}:{seed}s7:dropout"
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox 4x32-10 (Salmon et al. 2011): counters [..., 4] to random words [..., 4], of 32 bits
    in uint64 each."""
    u, half, low = np.uint64, np.uint64(32), np.uint64(2**32 - 1)
    a, b, c, d = np.moveaxis(np.asarray(counter).astype(u), -1, 0)
    for i in range(10):
        key0, key1 = (key[0] + i * 0x9E3779B9) % 2**32, (key[1] + i * 0xBB67AE85) % 2**32
        p, q = a * u(0xD2511F53), c * u(0xCD9E8D57)  # two words multiplied fit 64 bits
        a, b, c, d = (q >> half) ^ b ^ u(key0), q & low, (p >> half) ^ d ^ u(key1), p & low
    return np.stack([a, b, c, d], axis=-1)
