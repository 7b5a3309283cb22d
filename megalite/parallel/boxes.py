"""Boxes: axis-aligned parts of a global tensor. Pure arithmetic, no torch.

Every parameter has a global name and a global shape that no layout changes; a rank holds one box of it.
Initialisation, gradient norm, checkpoints and verification all speak in boxes.
"""

from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class Box:
    """The part of a tensor that starts at `offset` and has shape `shape`. An empty box has a 0 in its shape."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> "Box":
        """The box that is all of a tensor of this shape."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    def intersect(self, other: "Box") -> "Box | None":
        """The box common to both, or None when they share no element."""
        start = tuple(map(max, self.offset, other.offset))
        stop = tuple(
            min(o + n, p + m)
            for o, n, p, m in zip(self.offset, self.shape, other.offset, other.shape)
        )
        shape = tuple(b - a for a, b in zip(start, stop))
        return Box(start, shape) if all(n > 0 for n in shape) else None

    def slices_in(self, outer: "Box") -> tuple[slice, ...]:
        """Indices of this box in a tensor that holds `outer`."""
        return tuple(
            slice(o - p, o - p + n) for o, n, p in zip(self.offset, self.shape, outer.offset)
        )


def split(length: int, parts: int, index: int) -> tuple[int, int]:
    """(start, size) of part `index` when `length` is cut into `parts` equal parts of ceil(length / parts);
    the last parts may be shorter, or empty."""
    size = -(-length // parts)
    start = min(index * size, length)
    return start, min(size, length - start)
