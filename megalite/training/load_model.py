"""Load a trained model into one process, for programs that use it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megalite.checkpoint.folder import CheckpointError
from megalite.checkpoint.load import Checkpoint
from megalite.config.run import RunConfig, with_values
from megalite.config.yaml_file import config_of_checkpoint
from megalite.data.tokenizers import Tokenizer, checkpoint_data_config, trained_tokenizer
from megalite.models.stage import Stage
from megalite.parallel.context import ParallelContext, choose_device
from megalite.parallel.launch import detect
from megalite.parallel.rng import CounterBasedRng
from megalite.training.build import build_model
from megalite.training.state import load_weights


@dataclass(frozen=True)
class LoadedModel:
    """A model, its tokenizer and the configuration of the run that trained it."""

    config: RunConfig
    """Configuration of the run that wrote the checkpoint."""
    model: Stage
    """The whole model, in evaluation mode."""
    tokenizer: Tokenizer
    iteration: int
    """Iteration of the checkpoint."""


def load_model(
    folder: str | Path,
    architecture: str,
    step: int | None = None,
    device: str = "auto",
    **tokenizer: Any,
) -> LoadedModel:
    """Load the model of a checkpoint, whatever the layout that wrote it, and its tokenizer.

    Args:
        folder: the folder of checkpoints, as --save.
        architecture: gpt or bert.
        step: iteration to load; None: the latest.
        device: auto, cpu or cuda.
        tokenizer: fields of TOKENIZER_FIELDS that replace those of the checkpoint's configuration,
            unless they are None or False.

    Raises CheckpointError if there is no checkpoint of this architecture, TokenizerError if its
    tokenizer is not named, not found or does not fit, DeviceError if there is no such device.
    """
    with Checkpoint.open(folder, step) as checkpoint:
        config = config_of_checkpoint(checkpoint.config_yaml)
        found = config.model.architecture
        if found != architecture:
            difference = f"a {found.upper()}, not a {architecture.upper()}"
            raise CheckpointError(f"{checkpoint.folder} holds {difference}")
        data = checkpoint_data_config(config.data, tokenizer, checkpoint.folder)
        built_tokenizer = trained_tokenizer(data, config.model.vocab_size)

        # The model of one rank, in evaluation mode, with the weights of all.
        context = ParallelContext.single(single_process_device(device))
        # The libraries of the machine that trained it may be missing here.
        config = with_values(config, {"norm_backend": "auto"})
        model = build_model(config, context, CounterBasedRng.for_seed(0)).eval()
        load_weights(checkpoint, model.parameters_by_name)
        return LoadedModel(config, model, built_tokenizer, checkpoint.iteration)


def single_process_device(wanted: str) -> torch.device:
    """The device of a program with one process: auto, cpu or cuda. Raises DeviceError."""
    device, _ = choose_device(wanted, detect({}))  # without a launcher
    return device
