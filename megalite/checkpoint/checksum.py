"""Checksums of what a checkpoint holds: xxh3, 64 bits, in hexadecimal."""

from collections.abc import Iterator

from xxhash import xxh3_64 as Checksum
from xxhash import xxh3_64_hexdigest as checksum

BLOCK_BYTES = 4 << 20
"""A tensor's bytes have a checksum for each block of this size; the last block may be shorter."""
DIGITS = 16
"""Characters of one checksum."""

__all__ = ["BLOCK_BYTES", "DIGITS", "Checksum", "blocks_of", "checksum", "number_of_blocks"]


def blocks_of(size: int, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, int, int]]:
    """(number, start, stop) of each block of `size` bytes that holds any of the bytes `start` to
    `stop` (default: of all)."""
    stop = size if stop is None else stop
    for number in range(start // BLOCK_BYTES, number_of_blocks(stop)):
        first = number * BLOCK_BYTES
        yield number, first, min(first + BLOCK_BYTES, size)


def number_of_blocks(size: int) -> int:
    """How many blocks `size` bytes have."""
    return -(-size // BLOCK_BYTES)
