"""Weights of Megatron-LM's checkpoints in its format torch_dist, under megalite's names and
shapes."""

from math import prod
from pathlib import Path
from typing import Any

import torch

from megalite.checkpoint.folder import CheckpointError
from megalite.convert.distcp import Distcp
from megalite.convert.megatron_file import args_of, load_inert
from megalite.convert.megatron_model import Source, source_of, stored_shape
from megalite.convert.megatron_source import MegatronSource
from megalite.parallel.boxes import Box

COMMON_FILE = "common.pt"
COMMON_OBJECT = "common_state/"
"""Where what is no tensor is: in a file of its own, or in newer versions among the objects."""
LAYERS = "decoder.layers."
NOT_WEIGHTS = ("optimizer.", "rng_state", "rerun_state", "chained_")
"""Beginnings of the names of tensors that a model does not have."""


class MegatronDistWeights(MegatronSource):
    """The weights of a GPT of Megatron-core in the format torch_dist, which has global shapes.

    Layers are stored one by one, or all layers' tensors of a kind as one, with the layer as first
    dim. A box of queries, keys and values is no box of what is stored, so each is read whole.

    Args:
        folder: one checkpoint, `iter_0000100`.
        vocab_size: entries of the vocabulary, where the checkpoint knows only the padded number.

    Raises CheckpointError, with all problems, when it cannot be read as one of megalite's models.
    """

    def __init__(self, folder: Path, vocab_size: int | None = None):
        super().__init__(folder)
        self._stored = Distcp(folder)
        common = self._common()
        self.args = args_of(common)
        iteration = common.get("iteration", 0)
        self.iteration = iteration if isinstance(iteration, int) else 0
        tensor = self.args.get("tensor_model_parallel_size")
        if not isinstance(tensor, int):
            tensor = 1
        self._set_model(tensor, vocab_size, [])

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype. Raises CheckpointError when the name is unknown."""
        return self._stored.tensors[self._place(name)[0]].dtype

    def read(self, name: str, box: Box | None = None) -> torch.Tensor:
        """One box of a tensor (None: all of it). Raises CheckpointError when the name is unknown or
        the box is outside the shape."""
        box = self._box(name, box)
        key, layer = self._place(name)
        shape = self._shapes[name]
        wanted = Box.whole(self._stored.tensors[key].shape)
        if layer is not None:
            wanted = Box((layer, *wanted.offset[1:]), (1, *wanted.shape[1:]))
        values = self._stored.read(key, wanted).flatten()
        # What comes after the last element is the padding of a vocabulary.
        return values[: prod(shape)].view(shape)[box.slices_in(Box.whole(shape))]

    def close(self) -> None:
        """Nothing is open between two reads."""

    def _common(self) -> dict[str, Any]:
        """What is stored beside tensors."""
        path = self.folder / COMMON_FILE
        names = [name for name in self._stored.objects if name.startswith(COMMON_OBJECT)]
        try:
            if path.is_file():
                return load_inert(path)
            (common,) = load_inert(self._stored.bytes_of(self._stored.objects[names[0]]))
            return common
        except Exception as error:  # as of any foreign file
            reason = f"{type(error).__name__}: {error}".split("\n")[0]
            raise CheckpointError(
                f"{self.folder} has no readable {COMMON_FILE}: {reason}"
            ) from error

    def _find_all(self) -> list[str]:
        problems = []
        for name, shape in self._shapes.items():
            layer, source = source_of(name, self.model.swiglu)
            found = self._find(layer, source)
            if found is None:
                problems.append(f"{name}: no {' or '.join(source.names)}")
                continue
            self._places[name] = found
            wanted = stored_shape(shape, source.layout)
            if source.layout == "vocabulary":
                wanted = (self.args.get("padded_vocab_size"), *wanted[1:])
            key, index = found
            if index is not None:
                wanted = (self.model.num_layers, *wanted)
            tensor = self._stored.tensors[key]
            if tensor.shape != wanted:
                problems.append(f"{name}: {key} has shape {tensor.shape}, expected {wanted}")
            elif tensor.dtype is None:
                problems.append(f"{name}: {key} has a dtype that megalite does not have")
        used = {key for key, _ in self._places.values()}
        for key in self._stored.tensors:
            if key not in used and not key.startswith(NOT_WEIGHTS):
                problems.append(f"{key}: megalite has no such tensor in this model")
        return problems

    def _find(self, layer: int | None, source: Source) -> tuple[str, int | None] | None:
        """Where a tensor is: (key, index in the first dim or None); None when it is not there."""
        for theirs in source.names:
            candidates = [(theirs, None)]
            if layer is not None:
                candidates = [(f"{LAYERS}{layer}.{theirs}", None), (LAYERS + theirs, layer)]
            for candidate in candidates:
                if candidate[0] in self._stored.tensors:
                    return candidate
        return None
