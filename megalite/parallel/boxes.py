"""Boxes: axis-aligned parts of a global tensor. Pure arithmetic, no torch.

Every parameter has a global name and a global shape, the same in every layout; a rank holds one box
of it. Initialisation, gradient norm, checkpoints and verification are defined on boxes.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from operator import add, sub


@dataclass(frozen=True, slots=True)
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

    def lies_within(self, shape: Sequence[int]) -> bool:
        """Whether the box has as many dims as `shape` and no element outside of it."""
        if not len(self.offset) == len(self.shape) == len(shape):
            return False
        dims = zip(self.offset, self.shape, shape)
        return all(0 <= start and 0 <= size <= length - start for start, size, length in dims)

    def halves(self) -> "tuple[Box, Box]":
        """The box cut in two along its first dim that is longer than 1, which it must have."""
        dim = next(d for d, length in enumerate(self.shape) if length > 1)
        before, after = list(self.shape), list(self.shape)
        middle = list(self.offset)
        before[dim] //= 2
        after[dim] -= before[dim]
        middle[dim] += before[dim]
        return Box(self.offset, tuple(before)), Box(tuple(middle), tuple(after))

    def slices_in(self, outer: "Box") -> tuple[slice, ...]:
        """Indices of this box in a tensor that holds the box `outer`, which must contain it."""
        start = map(sub, self.offset, outer.offset)
        stop = map(sub, self.stop, outer.offset)
        return tuple(map(slice, start, stop))


def tile(boxes: Iterable[Box], shape: tuple[int, ...]) -> bool:
    """Whether the boxes cover every element of a tensor of this shape exactly once.

    Takes time in proportion to the number of boxes. A box is a sum of signs at its corners: the
    function that is 1 inside it and 0 outside is determined by its differences along every dim,
    which are +1 or -1 at the corners and 0 elsewhere. The boxes' functions add up to that of the
    whole tensor exactly when their signs do.
    """
    if prod(shape) == 0:
        return not any(box.numel for box in boxes)
    signs: Counter = Counter()
    for box in boxes:
        _add_corners(signs, box, 1)
    _add_corners(signs, Box.whole(shape), -1)
    return not any(signs.values())


def _add_corners(signs: Counter, box: Box, sign: int) -> None:
    if not box.numel:
        return
    # The corners at which an even number of dims are at their end come first with +1.
    for corner in product(*zip(box.offset, box.stop)):
        ends = sum(map(int.__eq__, corner, box.stop))
        signs[corner] += -sign if ends % 2 else sign


def boxes_of_range(shape: tuple[int, ...], start: int, stop: int) -> list[Box]:
    """The elements `start` to `stop` of a tensor, flattened in row-major order, as few boxes.

    Their elements follow each other: the boxes, each flattened, are the range. A range of a matrix
    is up to three boxes: the end of a row, whole rows, the beginning of a row.
    """
    if start >= stop:
        return []
    if len(shape) <= 1:
        return [Box((start,), (stop - start,))] if shape else [Box((), ())]
    inner = prod(shape[1:])
    first_whole = -(-start // inner)
    last_whole = stop // inner
    if first_whole > last_whole:  # within one row
        return _in_row(shape, last_whole, start - last_whole * inner, stop - last_whole * inner)
    boxes = _in_row(shape, first_whole - 1, start - (first_whole - 1) * inner, inner)
    if start == first_whole * inner:
        boxes = []
    if first_whole < last_whole:
        offset = (first_whole, *(0 for _ in shape[1:]))
        boxes.append(Box(offset, (last_whole - first_whole, *shape[1:])))
    return boxes + _in_row(shape, last_whole, 0, stop - last_whole * inner)


def _in_row(shape: tuple[int, ...], row: int, start: int, stop: int) -> list[Box]:
    """A range within one row of dim 0, as boxes of the whole tensor."""
    inner = boxes_of_range(shape[1:], start, stop)
    return [Box((row, *box.offset), (1, *box.shape)) for box in inner]


def split(length: int, parts: int, index: int) -> tuple[int, int]:
    """(start, size) of part `index` of `length` elements split into `parts`.

    Each part has ceil(length / parts) elements; the last ones may be shorter, or empty.
    """
    size = -(-length // parts)
    start = min(index * size, length)
    return start, min(size, length - start)
