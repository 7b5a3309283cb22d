"""The arithmetic of ranks: which rank holds which shard of the model. Pure, no torch.

Nothing else turns ranks into coordinates and back, or knows which ranks form a group.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import ClassVar


@dataclass(frozen=True, kw_only=True)
class ParallelLayout:
    """The size of every parallel axis.

    Ranks are numbered with the first of `axes` running fastest, so tensor-parallel neighbours,
    which communicate most, share a node: `rank = tensor + T * (data + D * pipeline)`. A further
    axis is one more name in `axes` and one more field.
    """

    axes: ClassVar[tuple[str, ...]] = ("tensor", "data", "pipeline")
    """Names of the axes, fastest first."""

    tensor: int = 1
    """Ranks that share the weights of each layer, T."""
    data: int = 1
    """Replicas that each train on their own samples, D."""
    pipeline: int = 1
    """Ranks that the layers are divided over, P."""

    def __post_init__(self):
        bad = {axis: size for axis, size in self.sizes.items() if size < 1}
        if bad:
            raise ValueError(f"axis sizes must be at least 1, not {bad}")

    @classmethod
    def for_world(cls, world_size: int, **sizes: int) -> "ParallelLayout":
        """The layout whose data axis takes the ranks that the given axes leave.

        Raises ValueError when a size is below 1 or the axes do not divide the world.
        """
        given = ", ".join(f"{axis} {size}" for axis, size in sizes.items())
        if world_size < 1 or min(sizes.values(), default=1) < 1:
            raise ValueError(f"sizes must be at least 1, not world {world_size}, {given}")
        taken = prod(sizes.values())
        if world_size % taken:
            shape = given.replace(", ", " x ")
            raise ValueError(f"{world_size} ranks cannot be divided into {shape}")
        return cls(data=world_size // taken, **sizes)

    @property
    def sizes(self) -> dict[str, int]:
        """Size of every axis by name, fastest first."""
        return {axis: getattr(self, axis) for axis in self.axes}

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return prod(self.sizes.values())

    @property
    def strides(self) -> dict[str, int]:
        """By how much the rank grows with one step along each axis."""
        strides = {}
        stride = 1
        for axis, size in self.sizes.items():
            strides[axis] = stride
            stride *= size
        return strides

    def coordinates(self, rank: int) -> dict[str, int]:
        """The position of a rank along every axis, each from 0.

        Raises ValueError outside 0 .. world_size - 1.
        """
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is outside this layout of {self.world_size} ranks")
        strides = self.strides
        return {axis: rank // strides[axis] % size for axis, size in self.sizes.items()}

    def rank_of(self, **coordinates: int) -> int:
        """The rank at these coordinates; an axis that is not given counts as 0.

        Raises ValueError outside the layout or for an unknown axis.
        """
        self._check_axes(coordinates)
        for axis, index in coordinates.items():
            if not 0 <= index < getattr(self, axis):
                raise ValueError(f"{axis} {index} is outside the layout {self}")
        strides = self.strides
        return sum(index * strides[axis] for axis, index in coordinates.items())

    def canonical(self, axes: Sequence[str]) -> tuple[str, ...]:
        """The axes of more than one rank among `axes`, in the order of the layout.

        Two sets of axes with the same canonical form have the same groups. Raises ValueError for an
        unknown axis.
        """
        self._check_axes(axes)
        return tuple(axis for axis in self.axes if axis in axes and getattr(self, axis) > 1)

    def group_of(self, rank: int, *axes: str) -> Sequence[int]:
        """The ranks that differ from `rank` along these axes only, ascending: a range where they
        are evenly spaced.

        Raises ValueError for an unknown axis or a rank outside the layout.
        """
        spanned = self.canonical(axes)
        strides = self.strides
        position = self.coordinates(rank)
        first = rank - sum(position[axis] * strides[axis] for axis in spanned)
        # The slowest axis comes first in the product, so the offsets ascend.
        steps = [range(0, getattr(self, axis) * strides[axis], strides[axis]) for axis in spanned]
        ranks = [first + sum(offsets) for offsets in product(*reversed(steps))]
        return _as_range(ranks)

    def groups(self, *axes: str) -> list[Sequence[int]]:
        """Every group along these axes, as `group_of` gives them, by their lowest rank."""
        return list(dict.fromkeys(self.group_of(rank, *axes) for rank in range(self.world_size)))

    def embedding_group(self, rank: int) -> tuple[int, int] | None:
        """The first and the last rank of a rank's pipeline, which hold copies of a tied embedding.

        None for the ranks between them and with one stage.
        """
        ranks = self.group_of(rank, "pipeline")
        if len(ranks) == 1 or rank not in (ranks[0], ranks[-1]):
            return None
        return ranks[0], ranks[-1]

    def embedding_groups(self) -> list[tuple[int, int]]:
        """Every group that `embedding_group` gives, by its lowest rank."""
        return sorted(set(map(self.embedding_group, range(self.world_size))) - {None})

    def _check_axes(self, axes: Sequence[str] | Mapping[str, int]) -> None:
        for axis in axes:
            if axis not in self.axes:
                raise ValueError(f"no axis {axis!r}; there are {', '.join(self.axes)}")

    def __str__(self) -> str:
        return f"dp={self.data} x tp={self.tensor} x pp={self.pipeline}"


def _as_range(ranks: list[int]) -> Sequence[int]:
    """Ascending ranks as a range where they are evenly spaced: a group of any size then has a short
    description."""
    if len(ranks) == 1:
        return range(ranks[0], ranks[0] + 1)
    step = ranks[1] - ranks[0]
    spaced = range(ranks[0], ranks[-1] + 1, step)
    return spaced if list(spaced) == ranks else tuple(ranks)
