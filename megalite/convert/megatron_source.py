"""What both formats of Megatron-LM's checkpoints have in common: the model that `args` describe."""

from abc import abstractmethod
from collections.abc import Collection
from pathlib import Path
from typing import Any

from megalite.checkpoint.folder import CheckpointError, listing
from megalite.checkpoint.source import TensorSource
from megalite.convert.megatron_model import model_fields
from megalite.convert.pieces import model_shapes
from megalite.models.cost import HeadCost
from megalite.models.shapes import Shapes
from megalite.nn.config import ModelConfig


class MegatronSource(TensorSource):
    """The weights of a GPT in one checkpoint of Megatron-LM, under megalite's names and shapes.

    A subclass opens the files, and then calls `_set_model`.
    """

    model: ModelConfig
    """The shape of the model."""
    iteration: int
    """Optimizer steps that it was trained for."""
    args: dict[str, Any]
    """Megatron-LM's arguments; what is no number, text or container is inert."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._shapes: Shapes = {}
        self._places: dict[str, Any] = {}
        """Where each tensor is stored, by megalite's name."""

    @property
    def names(self) -> Collection[str]:
        """Names of all tensors, as megalite has them."""
        return self._shapes.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Global shape. Raises CheckpointError when the name is unknown."""
        self._place(name)
        return self._shapes[name]

    @abstractmethod
    def _find_all(self) -> list[str]:
        """Fill `_places`. Returns the problems: what is missing, of another shape, or not known."""

    def _set_model(self, tensor: int, vocab_size: int | None, problems: list[str]) -> None:
        """Make the model from `args`, and find its tensors.

        tensor: the tensor-parallel size of the checkpoint. problems: those found so far. Raises
        CheckpointError with these, and all others.
        """
        fields, found = model_fields(self.args, tensor, vocab_size)
        self._refuse(found + problems)
        self.model = ModelConfig(**fields)
        self._shapes = model_shapes(self.model, HeadCost())
        self._refuse(self._find_all())

    def _place(self, name: str) -> Any:
        if name not in self._places:
            raise self._unknown(name)
        return self._places[name]

    def _refuse(self, problems: list[str]) -> None:
        if problems:
            heading = f"{self.folder} cannot be read as a model of megalite:"
            raise CheckpointError(listing(heading, problems))
