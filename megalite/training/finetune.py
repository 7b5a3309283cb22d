"""Train a classifier on a pretrained BERT in one process, save it, and load it."""

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
from megalite.optim.schedule import Schedule
from megalite.parallel.context import ParallelContext
from megalite.system.errors import error_message
from megalite.training.bad_steps import BadStepError
from megalite.training.finetune_config import WEIGHTS_FILE, ClassifierDescription, FinetuneConfig
from megalite.training.state import load_weights

CLIP_GRAD = 1.0


class Epoch(NamedTuple):
    """Results of one epoch, as means over examples."""

    number: int
    """Counted from 1."""
    training_loss: float
    """Cross-entropy of the training examples, each when it was trained on, with dropout."""
    validation_loss: float
    """Cross-entropy of the validation examples after the epoch."""
    accuracy: float
    """Accuracy on the validation examples after the epoch."""


def pretrained_classifier(
    checkpoint: Checkpoint,
    run: RunConfig,
    classes: int,
    config: FinetuneConfig,
    device: torch.device,
) -> Classifier:
    """Make a classifier from the encoder of a checkpoint of any layout, in fp32.

    Args:
        checkpoint: of a BERT.
        run: the configuration of the checkpoint.
        classes: number of classes.
        config: how the classifier is trained.
        device: where it is made.

    The pooler is the checkpoint's if it has one, else new. Raises CheckpointError if weights are
    missing or have other shapes.
    """
    context = ParallelContext.single(device)
    model = Classifier(
        run.model, context, classes, config.dropout, config.freeze_encoder, config.seed
    )
    new = ("classifier.",) if run.pair_head else ("classifier.", "pooler.")
    pretrained = {}
    for name, parameter in model.parameters_by_name.items():
        if not name.startswith(new):
            pretrained[name] = parameter
    load_weights(checkpoint, pretrained)
    return model


def finetune(
    model: Classifier, train: Rows, valid: Rows, config: FinetuneConfig
) -> Iterator[Epoch]:
    """Train, and yield the results of each epoch.

    Every epoch has its own random order; its last step may have fewer examples. Raises
    BadStepError before such a gradient changes a weight.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = {True: [], False: []}
    for parameter in trained:
        groups[parameter.spec.weight_decay].append(parameter)
    decayed = {"params": groups[True], "weight_decay": config.weight_decay}
    others = {"params": groups[False], "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([decayed, others], lr=config.lr, fused=True)
    steps = config.epochs * -(-len(train) // config.batch_size)
    rates = OptimizerConfig(
        lr=config.lr, lr_decay_style="linear", lr_warmup_fraction=config.warmup_fraction
    )
    schedule = Schedule(rates, steps + 1)  # 0 only after the last step
    step = 0
    for epoch in range(config.epochs):
        model.train()
        total = 0.0
        positions = order(len(train), config.seed, "epoch", epoch)
        for first in range(0, len(train), config.batch_size):
            step += 1
            for group in optimizer.param_groups:
                group["lr"] = schedule.learning_rate(step)

            # Forward. The sample numbers decide what dropout drops.
            chosen = positions[first : first + config.batch_size]
            samples = torch.arange(first, first + len(chosen)) + epoch * len(train)
            logits = model(_batch(train, chosen, model, samples))
            loss = cross_entropy(logits, torch.from_numpy(train.labels[chosen]).to(logits.device))

            # Backward, clip, update.
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(trained, CLIP_GRAD)
            if not norm.isfinite():
                reason = f"the gradient norm of step {step} is {norm}; use a lower --lr"
                raise BadStepError(reason)
            optimizer.step()
            total += loss.item() * len(chosen)
        validation_loss, accuracy = evaluate(model, valid, config.batch_size)
        yield Epoch(epoch + 1, total / len(train), validation_loss, accuracy)


def evaluate(model: Classifier, rows: Rows, batch_size: int) -> tuple[float, float]:
    """(mean cross-entropy, accuracy) of labelled rows."""
    logits = scores(model, rows, batch_size)
    labels = torch.from_numpy(rows.labels)
    right = logits.argmax(dim=1) == labels
    return cross_entropy(logits, labels).item(), right.double().mean().item()


@torch.no_grad()
def scores(model: Classifier, rows: Rows, batch_size: int) -> torch.Tensor:
    """Logits [n, c] of all rows, on the CPU. Puts the model in evaluation mode."""
    model.eval()
    logits = []
    for first in range(0, len(rows), batch_size):
        chosen = np.arange(first, min(first + batch_size, len(rows)))
        logits.append(model(_batch(rows, chosen, model)).cpu())
    return torch.cat(logits)


def _batch(
    rows: Rows, chosen: np.ndarray, model: Classifier, samples: torch.Tensor | None = None
) -> Microbatch:
    """The chosen rows on the model's device. `samples`: their global numbers, for dropout."""
    device = model.context.device
    fields = {}
    for name, array in rows.batch(chosen).items():
        fields[name] = torch.from_numpy(array).to(device)
    if samples is not None:
        samples = samples.to(device)
    return Microbatch(**fields, samples=samples)


def save_classifier(
    folder: str | Path, model: Classifier, description: ClassifierDescription
) -> None:
    """Write weights, description and tokenizer into a new folder, which appears when complete.

    Raises OSError.
    """
    folder = Path(folder)
    draft = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    draft.mkdir(parents=True)
    try:
        weights = {}
        for name, parameter in model.parameters_by_name.items():
            weights[name] = parameter.spec.real(parameter.detach()).cpu().contiguous()
        save_file(weights, draft / WEIGHTS_FILE)
        description.write(draft)
        draft.rename(folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def load_classifier(
    folder: str | Path, description: ClassifierDescription, device: torch.device
) -> Classifier:
    """Load a classifier that `save_classifier` wrote.

    Raises CheckpointError if its weights cannot be read or have other names or shapes.
    """
    context = ParallelContext.single(device)
    model = Classifier(description.config.model, context, len(description.classes))
    path = Path(folder) / WEIGHTS_FILE
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error_message(error)}") from None
    expected = {name: p.spec.global_shape for name, p in model.parameters_by_name.items()}
    if expected != {name: tuple(tensor.shape) for name, tensor in weights.items()}:
        raise CheckpointError(f"{path}: not the weights of the model that is described beside it")
    with torch.no_grad():
        for name, parameter in model.parameters_by_name.items():
            parameter.spec.real(parameter).copy_(weights[name])
    return model
