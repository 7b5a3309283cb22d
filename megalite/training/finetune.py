"""Train a classifier on top of a pretrained BERT, in one process; keep it, and use it."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy

from megalite.checkpoint.folder import CheckpointError
from megalite.checkpoint.load import Checkpoint
from megalite.config.run import RunConfig
from megalite.data.classification import Rows, order
from megalite.models.batch import Microbatch
from megalite.models.classifier import Classifier
from megalite.optim.config import OptimizerConfig
from megalite.optim.optimizer import NonFiniteGradient
from megalite.optim.schedule import learning_rate
from megalite.parallel.context import ParallelContext
from megalite.training.finetune_config import WEIGHTS_FILE, ClassifierDescription, FinetuneConfig
from megalite.training.state import load_weights

CLIP_GRAD = 1.0


class Epoch(NamedTuple):
    """What came of an epoch: means over its examples."""

    number: int
    """From 1."""
    training_loss: float
    """Of each example when its turn came, with dropout."""
    validation_loss: float
    accuracy: float
    """Of the validation examples."""


def pretrained_classifier(
    checkpoint: Checkpoint,
    run: RunConfig,
    classes: int,
    config: FinetuneConfig,
    device: torch.device,
) -> Classifier:
    """A classifier with the encoder of a checkpoint, in fp32, whatever the layout that wrote it. Its pooler is the
    checkpoint's where that has one, else new. Raises CheckpointError for what does not fit."""
    context = ParallelContext.single(device)
    model = Classifier(
        run.model, context, classes, config.dropout, config.freeze_encoder, config.seed
    )
    new = "classifier." if run.pair_head else ("classifier.", "pooler.")
    load_weights(
        checkpoint, {n: p for n, p in model.parameters_by_name.items() if not n.startswith(new)}
    )
    return model


def finetune(
    model: Classifier, train: Rows, valid: Rows, config: FinetuneConfig
) -> Iterator[Epoch]:
    """Train, and yield what came of each epoch. Every epoch has an order of its own, and its last step may be smaller.

    Raises NonFiniteGradient before such a gradient changes a weight.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {
            "params": [p for p in trained if p.spec.weight_decay],
            "weight_decay": config.weight_decay,
        },
        {"params": [p for p in trained if not p.spec.weight_decay], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, fused=True)
    steps = config.epochs * -(-len(train) // config.batch_size)
    schedule = OptimizerConfig(
        lr=config.lr, lr_decay_style="linear", lr_warmup_fraction=config.warmup_fraction
    )
    step = 0
    for epoch in range(config.epochs):
        model.train()
        total = 0.0
        places = order(len(train), config.seed, "epoch", epoch)
        for first in range(0, len(train), config.batch_size):
            chosen, step = places[first : first + config.batch_size], step + 1
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, schedule, steps + 1)  # 0 only after the last step
            samples = torch.arange(first, first + len(chosen)) + epoch * len(train)
            loss = cross_entropy(
                model(_batch(train, chosen, model, samples)), _labels(train, chosen, model)
            )
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(trained, CLIP_GRAD)
            if not norm.isfinite():
                raise NonFiniteGradient(
                    f"the gradient norm of step {step} is {norm}; use a lower --lr"
                )
            optimizer.step()
            total += loss.item() * len(chosen)
        yield Epoch(epoch + 1, total / len(train), *evaluate(model, valid, config.batch_size))


def evaluate(model: Classifier, rows: Rows, batch_size: int) -> tuple[float, float]:
    """(mean cross-entropy, accuracy) of labelled rows."""
    logits, labels = scores(model, rows, batch_size), torch.from_numpy(rows.labels)
    return cross_entropy(logits, labels).item(), (
        logits.argmax(dim=1) == labels
    ).double().mean().item()


@torch.no_grad()
def scores(model: Classifier, rows: Rows, batch_size: int) -> torch.Tensor:
    """Logits [n, c] of all rows, on the CPU. Puts the model in evaluation mode."""
    model.eval()
    places = np.arange(len(rows))
    parts = [places[first : first + batch_size] for first in range(0, len(rows), batch_size)]
    return torch.cat([model(_batch(rows, part, model)).cpu() for part in parts])


def _batch(
    rows: Rows, chosen: np.ndarray, model: Classifier, samples: torch.Tensor | None = None
) -> Microbatch:
    device = model.context.device
    fields = {
        name: torch.from_numpy(array).to(device) for name, array in rows.batch(chosen).items()
    }
    return Microbatch(**fields, samples=None if samples is None else samples.to(device))


def _labels(rows: Rows, chosen: np.ndarray, model: Classifier) -> torch.Tensor:
    return torch.from_numpy(rows.labels[chosen]).to(model.context.device)


def save_classifier(
    folder: str | Path, model: Classifier, description: ClassifierDescription
) -> None:
    """Write weights, description and tokenizer into a new folder, which appears when it is whole. Raises OSError."""
    folder = Path(folder)
    draft = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    draft.mkdir(parents=True)
    try:
        # Without the padding of the vocabulary.
        weights = {
            name: p.spec.real(p.detach()).cpu().contiguous()
            for name, p in model.parameters_by_name.items()
        }
        save_file(weights, draft / WEIGHTS_FILE)
        description.write(draft)
        draft.rename(folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def load_classifier(
    folder: str | Path, description: ClassifierDescription, device: torch.device
) -> Classifier:
    """A classifier that was saved. Raises CheckpointError when its weights are not there or of another shape."""
    model = Classifier(
        description.config.model, ParallelContext.single(device), len(description.classes)
    )
    path = Path(folder) / WEIGHTS_FILE
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    wanted = {name: p.spec.global_shape for name, p in model.parameters_by_name.items()}
    if wanted != {name: tuple(tensor.shape) for name, tensor in weights.items()}:
        raise CheckpointError(
            f"{path} does not hold the weights of the model that is described beside it"
        )
    with torch.no_grad():
        for name, parameter in model.parameters_by_name.items():
            parameter.spec.real(parameter).copy_(weights[name])
    return model
