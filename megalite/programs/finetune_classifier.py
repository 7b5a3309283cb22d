"""Train a classifier of texts, or of pairs of texts, on a pretrained BERT.

Example:
    python tools/finetune_classifier.py --load checkpoints --train train.tsv --valid valid.tsv \\
        --save classifier

One process reads a checkpoint of any layout. tools/classify.py uses what --save keeps.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np

from megalite.checkpoint.folder import CheckpointError, find_checkpoint
from megalite.config.cli import parse_options
from megalite.config.rules.files import read_stored_config
from megalite.config.run import RunConfig
from megalite.data.classification import (
    Columns,
    Quoting,
    Rows,
    classes_of,
    frame,
    hold_out,
    read_examples,
    refuse,
    unseen_labels,
)
from megalite.data.indexed import DatasetError
from megalite.data.tokenizers import TokenizerError, checkpoint_data_config, tokenizer_fields
from megalite.fields import Field
from megalite.programs.classify import input_problems
from megalite.programs.model_options import BertOptions
from megalite.programs.reporting import failures_reported
from megalite.training.finetune_config import ClassifierDescription, FinetuneConfig, bert_tokenizer

SHOWN_CLASSES = 20


@dataclass(frozen=True, kw_only=True)
class Options(BertOptions, FinetuneConfig):
    """What to train, from what, and how."""

    train: str
    """Examples to train with: .tsv with a header, or .jsonl."""
    valid: str | None = None
    """Examples to validate with, in place of --valid-share."""
    valid_share: Annotated[float | None, Field(above=0, below=1, example=0.1)] = None
    """Share of the training examples to validate with, chosen at random by the seed, in place of
    --valid."""
    save: str | None = None
    """New folder for the classifier as it is after the last epoch. Unset: it is not kept."""
    text_key: str = "text"
    """Column, or key of the JSON objects, that holds the text."""
    pair_key: str | None = None
    """Column or key of a second text, for pairs of texts. Unset: there is none."""
    label_key: str = "label"
    """Column or key of the label: any text or whole number."""
    quoting: Quoting = "csv"
    """Of .tsv files. csv: a field in quotes may hold tabs and line breaks; none: quotes are
    ordinary characters."""
    seq_length: int | None = None
    """Tokens that a text or pair is cut to, [CLS] and [SEP] among them. Unset: the checkpoint's."""

    @property
    def columns(self) -> Columns:
        """The columns of a .tsv file, or keys of a .jsonl file, that are read."""
        return Columns(self.text_key, self.pair_key, self.label_key)

    def problems(self) -> Iterator[str]:
        """What is wrong with these values, each with a fix."""
        yield from super().problems()
        names = self.columns.names
        if (self.valid is None) == (self.valid_share is None):
            yield "give one of --valid FILE and --valid-share 0.1"
        if len(set(names)) < len(names):
            yield f"--text-key, --pair-key and --label-key must differ: they are {', '.join(names)}"
        if self.save is not None and Path(self.save).exists():
            yield f"--save {self.save} exists: give the name of a new folder"
        if self.save is not None and not writable(self.save):
            yield f"--save {self.save}: cannot be created there"
        yield from input_problems("--train", self.train)
        if self.valid is not None:
            yield from input_problems("--valid", self.valid)


def writable(folder: str) -> bool:
    """Whether a new folder can be created: its nearest parent that exists is a folder to write
    to."""
    parent = next(parent for parent in Path(folder).absolute().parents if parent.exists())
    return parent.is_dir() and os.access(parent, os.W_OK)


def prepare(options: Options) -> tuple[ClassifierDescription, Rows, Rows]:
    """Read the data and turn it into rows of tokens: (the classifier, rows to train with, rows to
    validate with). Loads no torch.

    Raises DatasetError with all that is wrong with checkpoint, tokenizer and files.
    """
    # All problems of checkpoint, tokenizer and files are collected before any is raised.
    problems = []
    try:
        run = configuration(options)
        seq_length = run.model.seq_length if options.seq_length is None else options.seq_length
        # A row must hold a token of each text, and fit the model's positions.
        least = 3 if options.pair_key is None else 5
        positions = run.model.positions
        limit = ""
        if seq_length < least:
            limit = f"use {least} or more"
        elif run.model.position_embedding_type == "learned_absolute" and seq_length > positions:
            limit = f"the model has {positions} positions; use {positions} or less"
        if limit:
            problems.append(f"--seq-length {seq_length}: {limit}, [CLS] and [SEP] among them")
        tokenizer, special = bert_tokenizer(run)
    except (CheckpointError, TokenizerError) as error:
        problems.append(str(error))
    train, found = read_examples(options.train, options.columns, options.quoting)
    problems += found
    if options.valid is not None:
        valid, found = read_examples(options.valid, options.columns, options.quoting)
        problems += found
    refuse(problems)
    # The classes are those of the training examples.
    if options.valid is None:
        train, valid = hold_out(train, options.valid_share, options.seed)
    classes = classes_of(train)
    if len(classes) < 2:
        found = f"all labels are {classes[0]!r}"
        raise DatasetError(f"{options.train}: a classifier needs two classes, {found}")
    refuse(unseen_labels(valid, classes))
    made_by = {"config": run, "tokenizer_sha256": tokenizer.sha256}
    about = ClassifierDescription(classes, options.columns, seq_length, **made_by)
    shape = {"seq_length": seq_length, "classes": classes}
    rows = [frame(examples, tokenizer, special, **shape) for examples in (train, valid)]
    return about, *rows


def configuration(options: Options) -> RunConfig:
    """The configuration of the run that wrote the checkpoint, with the tokenizer of the flags.

    Raises CheckpointError if it cannot be read or is that of a GPT, TokenizerError if a file of the
    tokenizer is not found.
    """
    folder = find_checkpoint(options.load, options.ckpt_step)
    run = read_stored_config(folder)
    if run.model.architecture != "bert":
        other = "give a checkpoint of pretrain_bert.py"
        raise CheckpointError(f"--load {options.load} holds a GPT; {other}")
    data = checkpoint_data_config(run.data, tokenizer_fields(options), folder)
    return replace(run, data=data)


def train(options: Options, about: ClassifierDescription, training: Rows, valid: Rows) -> None:
    """Train, report each epoch, and save."""
    from megalite.checkpoint.load import Checkpoint
    from megalite.training.finetune import finetune, pretrained_classifier, save_classifier
    from megalite.training.load_model import single_process_device

    device = single_process_device(options.device)
    count = len(about.classes)
    with Checkpoint.open(options.load, options.ckpt_step) as checkpoint:
        model = pretrained_classifier(
            checkpoint, about.config, count, config=options, device=device
        )
        print(f"iteration {checkpoint.iteration} of {options.load}, on {device}")
    # What it is trained from.
    if not about.config.pair_head:
        without = "the checkpoint was trained with --bert-pair none and has no pooler"
        print(f"{without}: a new one is trained")
    for name, rows in (("training", training), ("validation", valid)):
        print(f"{len(rows)} {name} examples, {rows.cut} of them cut to {about.seq_length} tokens")
    more = ", ..." if count > SHOWN_CLASSES else ""
    print(f"{count} classes: {', '.join(about.classes[:SHOWN_CLASSES])}{more}", flush=True)
    # Always guessing the most frequent class of the training data is right in this share.
    most_frequent = np.bincount(training.labels).argmax()
    baseline = (valid.labels == most_frequent).mean()
    for epoch in finetune(model, training, valid, config=options):
        print(
            f"epoch {epoch.number}/{options.epochs} "
            f"| training loss {epoch.training_loss:.4f} "
            f"| validation loss {epoch.validation_loss:.4f} "
            f"| accuracy {epoch.accuracy:.4f} | baseline {baseline:.4f}",
            flush=True,
        )
    print(
        f"accuracy {epoch.accuracy:.4f} on {len(valid)} validation examples; "
        f"always guessing {about.classes[most_frequent]!r}, the most frequent class of the "
        f"training data: {baseline:.4f}"
    )
    if options.save is not None:
        save_classifier(options.save, model, about)
        print(f"saved to {options.save}")


def main() -> None:
    """Read the flags, report all problems at once (status 2, or 1 for what is in the files),
    train."""
    options = parse_options(Options, __doc__, check=Options.problems)
    with failures_reported():
        train(options, *prepare(options))
