"""The arithmetic of ranks: which rank is which part of the model. Pure, no torch.

The only place that turns ranks into coordinates and back. Order, fastest first: tensor, data, pipeline, so that
tensor-parallel neighbours, which talk the most, share a node.
"""

from dataclasses import dataclass
from typing import NamedTuple

AXES = ("pipeline", "data", "tensor")


class Coordinates(NamedTuple):
    """A rank's place: its pipeline stage, data-parallel replica and tensor-parallel part, each from 0."""

    pipeline: int
    data: int
    tensor: int


@dataclass(frozen=True)
class ParallelLayout:
    """Sizes of the three axes. `rank = tensor + T * (data + D * pipeline)`."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1

    def __post_init__(self):
        bad = {axis: getattr(self, axis) for axis in AXES if getattr(self, axis) < 1}
        if bad:
            raise ValueError(f"axis sizes must be at least 1, not {bad}")

    @classmethod
    def for_world(cls, world_size: int, tensor: int = 1, pipeline: int = 1) -> "ParallelLayout":
        """The layout whose data axis takes all that tensor and pipeline leave. Raises ValueError if nothing fits."""
        if tensor < 1 or pipeline < 1 or world_size < 1:
            raise ValueError(
                f"sizes must be at least 1, not world {world_size}, tensor {tensor}, pipeline {pipeline}"
            )
        if world_size % (tensor * pipeline):
            raise ValueError(
                f"{world_size} ranks cannot be divided into tensor {tensor} x pipeline {pipeline}"
            )
        return cls(tensor, pipeline, world_size // (tensor * pipeline))

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.tensor * self.pipeline * self.data

    def coordinates(self, rank: int) -> Coordinates:
        """Where `rank` stands. Raises ValueError outside 0 .. world_size - 1."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is outside this layout of {self.world_size} ranks")
        rest, tensor = divmod(rank, self.tensor)
        pipeline, data = divmod(rest, self.data)
        return Coordinates(pipeline, data, tensor)

    def rank_of(self, pipeline: int = 0, data: int = 0, tensor: int = 0) -> int:
        """The rank at these coordinates. Raises ValueError outside the layout."""
        at = Coordinates(pipeline, data, tensor)
        if not all(0 <= getattr(at, axis) < getattr(self, axis) for axis in AXES):
            raise ValueError(f"{at} is outside the layout {self}")
        return tensor + self.tensor * (data + self.data * pipeline)

    def groups(self, axis: str) -> list[range]:
        """All groups along an axis: each the ranks that differ in this coordinate only, in its order.

        Raises ValueError for an axis that is not one of AXES.
        """
        if axis not in AXES:
            raise ValueError(f"no axis {axis!r}; there are {', '.join(AXES)}")
        stride = {"tensor": 1, "data": self.tensor, "pipeline": self.tensor * self.data}[axis]
        span = getattr(self, axis) * stride
        firsts = [r for r in range(self.world_size) if getattr(self.coordinates(r), axis) == 0]
        return [range(first, first + span, stride) for first in firsts]

    def embedding_groups(self) -> list[tuple[int, ...]]:
        """Pairs of first and last stage, which hold copies of a tied embedding; empty with one stage."""
        if self.pipeline == 1:
            return []
        return [(ranks[0], ranks[-1]) for ranks in self.groups("pipeline")]

    def __str__(self) -> str:
        return f"dp={self.data} x tp={self.tensor} x pp={self.pipeline}"
