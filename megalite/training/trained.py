"""A trained model in one process, whatever the layout that wrote it: for tools that use one."""

from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from megalite.checkpoint.folder import CheckpointError
from megalite.checkpoint.load import Checkpoint
from megalite.config.run import RunConfig, from_flat
from megalite.data.tokenizers import Tokenizer, trained_tokenizer, with_tokenizer
from megalite.models.stage import Stage
from megalite.parallel.context import ParallelContext, choose_device
from megalite.parallel.launch import LaunchInfo
from megalite.parallel.rng import CounterBasedRng
from megalite.training.build import build_model
from megalite.training.state import load_weights


@dataclass(frozen=True)
class LoadedModel:
    """A model and what belongs to it."""

    config: RunConfig
    """Of the run that made it."""
    model: Stage
    """All of it, in evaluation mode."""
    tokenizer: Tokenizer
    iteration: int


def load_model(
    folder: str | Path,
    architecture: str,
    step: int | None = None,
    device: str = "auto",
    **tokenizer: str | None,
) -> LoadedModel:
    """The model of a checkpoint, of iteration `step` or the latest, and its tokenizer.

    device: auto, cpu or cuda. tokenizer: tokenizer_type, tokenizer_model, vocab_file and merge_file, in place of what
    the configuration in the checkpoint says. Raises CheckpointError when there is none of this architecture,
    TokenizerError, DeviceError.
    """
    with Checkpoint.open(folder, step) as checkpoint:
        config = from_flat(yaml.safe_load(checkpoint.config_yaml))
        if config.model.architecture != architecture:
            raise CheckpointError(
                f"{checkpoint.folder} holds a {config.model.architecture.upper()}, not a {architecture.upper()}"
            )
        used = trained_tokenizer(with_tokenizer(config.data, tokenizer), config.model.vocab_size)
        chosen, _ = choose_device(device, LaunchInfo(0, 1, 0, 1, "", "none"))
        alone = replace(config, parallel=replace(config.parallel, sequence_parallel=False))
        model = build_model(
            alone, ParallelContext.single(chosen), CounterBasedRng.for_seed(0)
        ).eval()
        load_weights(checkpoint, model.parameters_by_name)
        return LoadedModel(config, model, used, checkpoint.iteration)
