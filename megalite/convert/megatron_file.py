"""The files of one rank in Megatron-LM's legacy format, read without running what is in them.

`model_optim_rng.pt` is a pickle in a zip archive. `torch.load(weights_only=True)` makes tensors and
plain containers of it, and refuses every other name. A checkpoint of Megatron-LM has many: its
`args`, enums, states of random generators, loss scalers of code that is gone. Each of them becomes
an `Inert` object here, which keeps what it was given and calls nothing.
"""

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from megalite.checkpoint.folder import CheckpointError

FILE_NAME = "model_optim_rng.pt"
OLD_NAMES = (
    "argparse.Namespace",
    "numpy.core.multiarray._reconstruct",
    "numpy.ndarray",
    "numpy.dtype",
    "megatron.fp16.loss_scaler.DynamicLossScaler",
    "megatron.enums.ModelType",
    "megatron.model.enums.ModelType",
    "fp16.loss_scaler.DynamicLossScaler",
)
"""Names in files of torch before 1.6, which are no zip archives and cannot be asked for theirs."""


class Inert:
    """Stands for an object of a class or function that is not wanted: holds its arguments and
    state."""

    def __new__(cls, *arguments):
        """An object that holds what its class or function would have been called with."""
        made = object.__new__(cls)
        made.arguments = arguments
        made.state = None
        return made

    def __init__(self, *arguments):
        pass

    def __setstate__(self, state):
        self.state = state

    def __repr__(self):
        inside = ", ".join(map(repr, self.arguments))
        return f"{type(self).__name__}({inside})"


@dataclass(frozen=True)
class RankFile:
    """What is wanted of a rank's file."""

    args: dict[str, Any]
    version: float
    """Of the order of qkv: 0, 1, 2 or 3."""
    iteration: int
    chunks: tuple[dict[str, torch.Tensor], ...]
    """Tensors by name of each virtual stage of the rank. They are read from the disk when they are
    used."""


def read_rank_file(path: Path) -> RankFile:
    """Open a rank's file. Raises CheckpointError."""
    try:
        state = load_inert(path)
        args = args_of(state)
        chunks = []
        keys = ("model",) if "model" in state else ()
        keys = keys or [f"model{i}" for i in range(len(state)) if f"model{i}" in state]
        if not keys:
            raise ValueError(f"it has {', '.join(map(str, state))}, but no model")
        for key in keys:
            tensors = {}
            _flatten(state[key], "", tensors)
            chunks.append(tensors)
        version = float(state.get("checkpoint_version", 0))
        return RankFile(args, version, int(state.get("iteration", 0)), tuple(chunks))
    # Files of another kind, or damaged or hostile ones, fail in many ways.
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        if "weights_only" in reason:  # torch's text offers to read it in an unsafe way
            reason = "it is damaged, or holds what is not read"
        elif not isinstance(error, (ValueError, OSError)):  # whose texts are sentences
            reason = f"{type(error).__name__}: {reason}"
        raise CheckpointError(f"{path} is no checkpoint of Megatron-LM: {reason}") from error


def args_of(state: Any) -> dict[str, Any]:
    """Megatron-LM's arguments by name. Raises ValueError when there are none."""
    args = state.get("args") if isinstance(state, dict) else None
    if isinstance(args, Inert):
        args = args.state
    if not isinstance(args, dict):
        raise ValueError("it has no args")
    return args


def load_inert(file: Path | BytesIO) -> Any:
    """What `torch.save` wrote: tensors, numbers and containers, and all else inert."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        mapped = isinstance(file, Path)
    except ValueError:  # no zip archive
        names = OLD_NAMES
        mapped = False
    if not isinstance(file, Path):
        file.seek(0)
    stand_ins = [(type(name.rpartition(".")[2], (Inert,), {}), name) for name in names]
    with torch.serialization.safe_globals(stand_ins):
        return torch.load(file, map_location="cpu", mmap=mapped, weights_only=True)


def _flatten(item: Any, name: str, tensors: dict[str, torch.Tensor]) -> None:
    """Collect the tensors of nested dictionaries, as old checkpoints have them, by joined name."""
    if isinstance(item, torch.Tensor):
        # One element can be given any shape, with strides of 0.
        if item.nbytes > item.untyped_storage().nbytes():
            raise ValueError(f"{name} has shape {tuple(item.shape)}, but is not all there")
        tensors[name] = item
    elif isinstance(item, dict):
        for key, inner in item.items():
            _flatten(inner, f"{name}.{key}" if name else str(key), tensors)
