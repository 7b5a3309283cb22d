"""Boxes: axis-aligned parts of a global tensor. Pure arithmetic, no torch.

Every parameter has a global name and a global shape, the same in every layout; a rank holds one box
of it. Initialisation, gradient norm, checkpoints and verification are defined on boxes.
"""

from dataclasses import dataclass
from math import prod
from operator import add, sub


@dataclass(frozen=True)
class Box:
    """The part of a tensor that starts at `offset` and has shape `shape`.

    An empty box has a 0 in its shape.
    """

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> "Box":
        """The box of a whole tensor of this shape."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def stop(self) -> tuple[int, ...]:
        """The exclusive end of the box along each dim."""
        return tuple(map(add, self.offset, self.shape))

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    def intersect(self, other: "Box") -> "Box | None":
        """The box common to both, or None when they share no element."""
        start = tuple(map(max, self.offset, other.offset))
        stop = map(min, self.stop, other.stop)
        shape = tuple(map(sub, stop, start))
        if min(shape, default=1) <= 0:
            return None
        return Box(start, shape)

    def slices_in(self, outer: "Box") -> tuple[slice, ...]:
        """Indices of this box in a tensor that holds the box `outer`, which must contain it."""
        start = map(sub, self.offset, outer.offset)
        stop = map(sub, self.stop, outer.offset)
        return tuple(map(slice, start, stop))


def split(length: int, parts: int, index: int) -> tuple[int, int]:
    """(start, size) of part `index` of `length` elements split into `parts`.

    Each part has ceil(length / parts) elements; the last ones may be shorter, or empty.
    """
    size = -(-length // parts)
    start = min(index * size, length)
    return start, min(size, length - start)
