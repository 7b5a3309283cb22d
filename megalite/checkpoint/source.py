"""What tensors are read from: a checkpoint of megalite, or weights of another format under
megalite's names."""

import difflib
from abc import abstractmethod
from collections.abc import Collection, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from megalite.checkpoint.folder import SHOWN_PROBLEMS, CheckpointError, listing
from megalite.checkpoint.format import Shard
from megalite.parallel.boxes import Box


class TensorSource(AbstractContextManager):
    """Stored tensors with global names, of which any box can be read; usable in a `with` block.

    Each rank may open one; nothing communicates. A subclass gives `names`, `shape`, `dtype`, `read`
    and `close`.
    """

    folder: Path
    """Where they are stored."""

    @property
    @abstractmethod
    def names(self) -> Collection[str]:
        """Names of all tensors."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Global shape. Raises CheckpointError when the name is unknown."""

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype. Raises CheckpointError when the name is unknown."""

    @abstractmethod
    def read(self, name: str, box: Box | None = None) -> torch.Tensor:
        """One box of a tensor (None: all of it), on the CPU, in the stored dtype.

        Raises CheckpointError when the name is unknown or the box is outside the stored shape.
        """

    @abstractmethod
    def close(self) -> None:
        """Close the files; a later read opens them again."""

    def __exit__(self, *exception) -> None:
        self.close()

    def check(self, shards: Iterable[Shard]) -> None:
        """Raise one CheckpointError that lists every shard whose tensor is not stored, or is stored
        with another global shape."""
        self.check_shapes({shard.name: tuple(shard.global_shape) for shard in shards})

    def check_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise one CheckpointError that lists every tensor of these global shapes, by name, that
        is not stored, or is stored with another one."""
        missing = set()
        problems = []
        for name, wanted in shapes.items():
            if name not in self.names:
                missing.add(name)
            elif self.shape(name) != wanted:
                problems.append(f"{name}: shape {self.shape(name)} is stored, {wanted} is wanted")
        if not missing and not problems:
            return
        # Finding similar names is slow: only for those that are shown.
        shown = sorted(missing)[:SHOWN_PROBLEMS]
        lines = [f"{name}: not stored{self._nearest(name)}" for name in shown]
        total = len(missing) + len(problems)
        heading = f"{self.folder} does not hold what is wanted:"
        raise CheckpointError(listing(heading, lines + problems, total))

    def read_into(self, shard: Shard) -> None:
        """Fill the shard's tensor, converted to its dtype and device.

        Raises CheckpointError when the tensor is not stored, or with another global shape.
        """
        self.check([shard])
        with torch.no_grad():
            shard.tensor.copy_(self.read(shard.name, shard.box))

    def _box(self, name: str, box: Box | None) -> Box:
        """The box to read; None: all of the tensor. Raises CheckpointError, as `read`."""
        shape = self.shape(name)
        box = Box.whole(shape) if box is None else box
        if not box.lies_within(shape):
            outside = f"has shape {shape}; {box} does not lie in it"
            raise CheckpointError(f"{self.folder}: {name} {outside}")
        return box

    def _unknown(self, name: str) -> CheckpointError:
        """The error for a name of which no tensor is stored."""
        return CheckpointError(f"{self.folder}: {name} is not stored{self._nearest(name)}")

    def _nearest(self, name: str) -> str:
        near = difflib.get_close_matches(name, self.names, n=2)
        return f" (nearest: {', '.join(near)})" if near else ""
