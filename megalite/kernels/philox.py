"""Philox 4x32-10: counter-based random numbers. Pure NumPy, no torch.

Philox (Salmon et al. 2011) turns a 128-bit counter and a 64-bit key into 128 random bits. A
number's value depends on its key and counter alone, so no layout, device or order of calls changes
it: take the key from *what* is drawn (`key_of(seed, "weights", name)`) and the counter from *where*
it goes (`counters(first, count)`).
"""

import hashlib
import operator
from collections.abc import Sequence

import numpy as np

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
MASK = 0xFFFFFFFF
BLOCK = 16384
"""Counters computed at a time: four columns of 8 bytes and two products, 768 KiB, stay in a core's
cache."""


def key_of(seed: int, *what: str | int) -> tuple[int, int]:
    """The key of a stream of random numbers: two 32-bit words, the same on every platform.

    Different arguments give unrelated keys: `key_of(1, "ab")`, `key_of(1, "a", "b")` and `key_of(1,
    "1")` differ.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in (seed, *what):
        text = part if isinstance(part, str) else str(operator.index(part))
        data = text.encode()
        digest.update(f"{'s' if isinstance(part, str) else 'i'}{len(data)}:".encode() + data)
    key = int.from_bytes(digest.digest(), "little")
    return key & MASK, key >> 32


def counters(start: int, count: int) -> np.ndarray:
    """The counters start, start + 1, ..., as uint32 [count, 4], lowest word first; words 2 and 3
    are 0.

    Raises ValueError unless 0 <= start and start + count <= 2^64.
    """
    if start < 0 or count < 0 or start + count > 2**64:
        raise ValueError(f"counters {start} to {start + count} do not lie in 0 .. 2^64")
    low = np.arange(count, dtype=np.uint64)
    low += np.uint64(start)
    result = np.zeros((count, 4), dtype=np.uint32)
    result[:, 0] = low & np.uint64(MASK)
    result[:, 1] = low >> np.uint64(32)
    return result


def philox4x32(counter: np.ndarray, key: Sequence[int]) -> np.ndarray:
    """Ten rounds of Philox 4x32 under a key of two words: counters, uint32 [..., 4], to random
    words, uint32 [..., 4].

    Raises ValueError when a counter or the key has another shape.
    """
    counter = np.asarray(counter, dtype=np.uint32)
    if counter.ndim == 0 or counter.shape[-1] != 4 or len(key) != 2:
        raise ValueError(
            "Philox needs counters [..., 4] and a key of 2 words, "
            f"not {counter.shape} and {len(key)}"
        )
    flat = counter.reshape(-1, 4)
    words = np.empty((len(flat), 4), dtype=np.uint32)
    size = min(BLOCK, len(flat))
    columns = np.empty((4, size), dtype=np.uint64)
    products = np.empty((2, size), dtype=np.uint64)
    for start in range(0, len(flat), BLOCK):
        stop = min(start + BLOCK, len(flat))
        block = columns[:, : stop - start]
        block[:] = flat[start:stop].T
        words[start:stop] = _rounds(block, products[:, : stop - start], int(key[0]), int(key[1])).T
    return words.reshape(counter.shape)


def _rounds(columns: np.ndarray, products: np.ndarray, key0: int, key1: int) -> np.ndarray:
    """Apply the rounds in place to columns, uint64 [4, n] of 32-bit values; products is room for
    uint64 [2, n]."""
    multipliers = list(map(np.uint64, MULTIPLIERS))
    mask, half = np.uint64(MASK), np.uint64(32)
    a, b, c, d = columns
    p, q = products
    for _ in range(ROUNDS):
        np.multiply(a, multipliers[0], out=p)
        np.multiply(c, multipliers[1], out=q)
        # a, b, c, d = high(q) ^ b ^ key0, low(q), high(p) ^ d ^ key1, low(p)
        np.right_shift(q, half, out=a)
        a ^= b
        a ^= np.uint64(key0)
        np.bitwise_and(q, mask, out=b)
        np.right_shift(p, half, out=c)
        c ^= d
        c ^= np.uint64(key1)
        np.bitwise_and(p, mask, out=d)
        key0 = (key0 + KEY_STEPS[0]) & MASK
        key1 = (key1 + KEY_STEPS[1]) & MASK
    return columns
