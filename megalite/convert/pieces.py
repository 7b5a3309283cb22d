"""How a tensor of another format lies in one of ours. Imports no torch.

Letters of axes: g query groups, j queries of a group, its key and its value (q + 2), d head size,
h hidden, n all heads' components (n d), f ffn size, u gate and up (2), v vocabulary, p positions,
t token types, c classes.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from math import prod
from typing import Any

from megalite.models.cost import HeadCost
from megalite.models.shapes import Shapes, stage_shapes
from megalite.nn.config import ModelConfig
from megalite.parallel.boxes import Box

PARTS: dict[str, tuple[str, int, int]] = {
    "queries": ("j", 0, -2),
    "key": ("j", -2, -1),
    "value": ("j", -1, 0),
    "gate": ("u", 0, 1),
    "up": ("u", 1, 0),
}
"""Parts of a fused tensor: (axis, start, end) of each; an end of 0 is the end of the axis, and
below 0 counts from there."""


@dataclass(frozen=True)
class Piece:
    """One line of a mapping table: a tensor of theirs is a part of one of ours, reordered."""

    theirs: str
    """Their name; `{}` stands for the number of the layer."""
    ours: str
    """Our name, with the same `{}`."""
    order: str = ""
    """Their dims, then ours, by axes: `h (j g d) -> g j d h`. Axes in parentheses are one dim, the
    last one fastest. Empty: the same dims."""
    part: str = ""
    """A key of PARTS: which part of our tensor it is. Empty: all."""


@dataclass(frozen=True)
class PlacedPiece:
    """A piece of a model of some shape: what `Piece` says in numbers."""

    theirs: str
    """Their name."""
    shape: tuple[int, ...]
    """Their shape."""
    ours: str
    """Our name."""
    box: Box
    """The part of our tensor."""
    factored: tuple[int, ...]
    """Their shape with each axis as a dim."""
    to_ours: tuple[int, ...]
    """Axes of `factored` in our order."""

    def as_theirs(self, tensor: Any) -> Any:
        """Our values of `box` as their tensor: a view where the order is the same."""
        from_ours = sorted(range(len(self.to_ours)), key=self.to_ours.__getitem__)
        return tensor.permute(from_ours).reshape(self.shape)


@dataclass(frozen=True)
class Placement:
    """All tensors of a model in another format, and where they lie in ours."""

    by_name: dict[str, list[PlacedPiece]]
    """Pieces of each of our tensors, by its name."""
    problems: list[str]
    """Tensors of ours that the other format has no place for."""

    @property
    def pieces(self) -> Iterator[PlacedPiece]:
        """Every tensor of theirs."""
        for found in self.by_name.values():
            yield from found


def model_shapes(model: ModelConfig, head: HeadCost) -> Shapes:
    """Global shapes of all parameters of a model by name."""
    return stage_shapes(model, head, range(model.num_layers), rows=model.vocab_size)


def place(table: Iterable[Piece], shapes: Shapes) -> Placement:
    """Where the tensors of a table lie in a model with parameters of these shapes."""
    by_pattern: dict[str, list[Piece]] = {}
    for piece in table:
        by_pattern.setdefault(piece.ours, []).append(piece)
    by_name = {}
    problems = []
    for name, shape in shapes.items():
        layer = ""
        pattern = name
        numbered = re.fullmatch(r"layers\.(\d+)\.(.*)", name)
        if numbered:
            layer = numbered[1]
            pattern = f"layers.{{}}.{numbered[2]}"
        pieces = []
        for piece in by_pattern.get(pattern, ()):
            if fits(piece, shape):
                pieces.append(_placed(piece, name, shape, layer))
        covered = sum(piece.box.numel for piece in pieces)
        if covered == prod(shape):
            by_name[name] = pieces
        else:
            problems.append(name)
    return Placement(by_name, problems)


def fits(piece: Piece, shape: tuple[int, ...]) -> bool:
    """Whether a tensor of ours of this shape has the axes that the piece names: a table may have
    lines for gated and plain MLPs."""
    return not piece.order or len(_axes(piece.order)[1]) == len(shape)


def _axes(order: str) -> tuple[list[list[str]], list[str]]:
    """(axes of each of their dims, our axes): `h (j g)-> j g h` gives ([[h], [j, g]], [j, g, h])"""
    theirs, ours = order.split("->")
    dims = [group.strip("()").split() for group in re.findall(r"\([^)]*\)|\w+", theirs)]
    return dims, ours.split()


def _placed(piece: Piece, name: str, shape: tuple[int, ...], layer: str) -> PlacedPiece:
    """A piece of our tensor of this name and shape."""
    axes = list(map(str, range(len(shape))))
    dims = list(map(list, axes))
    if piece.order:
        dims, axes = _axes(piece.order)
    # The box.
    offset = [0] * len(shape)
    sizes = list(shape)
    if piece.part:
        axis, start, end = PARTS[piece.part]
        place = axes.index(axis)
        length = shape[place]
        first = start if start >= 0 else length + start
        last = end if end > 0 else length + end
        offset[place] = first
        sizes[place] = last - first
    size_of = dict(zip(axes, sizes, strict=True))
    # Their shape.
    flat = list(chain.from_iterable(dims))
    their_shape = tuple(prod(map(size_of.__getitem__, dim)) for dim in dims)
    return PlacedPiece(
        theirs=piece.theirs.format(layer),
        shape=their_shape,
        ours=name,
        box=Box(tuple(offset), tuple(sizes)),
        factored=tuple(map(size_of.__getitem__, flat)),
        to_ours=tuple(map(flat.index, axes)),
    )
