"""Train a classifier of texts, or of pairs of texts, on a pretrained BERT.

Example:
    python tools/finetune_classifier.py --load checkpoints --train train.tsv --valid valid.tsv \\
        --save classifier

One process reads a checkpoint of any layout. tools/classify.py uses what --save keeps.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from megalite.checkpoint.folder import CheckpointError, checkpoint_folder, latest_iteration
from megalite.config.cli import parse_options
from megalite.config.rules.files import read_config
from megalite.config.run import RunConfig
from megalite.data.classification import (
    SUFFIXES,
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
from megalite.programs import reporting
from megalite.training.finetune_config import ClassifierDescription, FinetuneConfig, bert_tokenizer

SHOWN_CLASSES = 20


@dataclass(frozen=True, kw_only=True)
class Options(FinetuneConfig):
    """What to train, from what, and how."""

    load: str
    """Folder of checkpoints, as --save of pretrain_bert.py."""
    train: str
    """Examples to train with: .tsv with a header, or .jsonl."""
    valid: str | None = None
    """Examples to validate with, in place of --valid-share."""
    valid_share: float | None = None
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
    ckpt_step: int | None = None
    """Iteration to load. Unset: the latest."""
    tokenizer_type: (
        Literal["BertWordPieceLowerCase", "BertWordPieceCase", "HuggingFaceTokenizer"] | None
    ) = None
    """Tokenizer. Unset: the one in the checkpoint's configuration."""
    vocab_file: str | None = None
    """Its vocab.txt (BertWordPiece*). Unset: the one in the checkpoint's configuration."""
    tokenizer_model: str | None = None
    """Its tokenizer.json (HuggingFaceTokenizer). Unset: the one in the checkpoint's
    configuration."""
    parse_special_tokens: bool = False
    """Take the text of a special token for that token, which is the default if the checkpoint's
    run did."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto takes a GPU when there is one."""

    @property
    def columns(self) -> Columns:
        """The columns of a .tsv file, or keys of a .jsonl file, that are read."""
        return Columns(self.text_key, self.pair_key, self.label_key)

    def problems(self) -> list[str]:
        """Everything wrong with these values, each with a fix."""
        names = self.columns.names
        suffixes = " or ".join(SUFFIXES)
        checks = [
            (not Path(self.load).is_dir(), f"--load {self.load}: there is no such folder"),
            (
                (self.valid is None) == (self.valid_share is None),
                "give one of --valid FILE and --valid-share 0.1",
            ),
            (
                self.valid_share is not None and not 0 < self.valid_share < 1,
                f"--valid-share {self.valid_share}: use a share between 0 and 1",
            ),
            (
                len(set(names)) < len(names),
                f"--text-key, --pair-key and --label-key must differ: they are {', '.join(names)}",
            ),
            (
                self.save is not None and Path(self.save).exists(),
                f"--save {self.save} exists: give the name of a new folder",
            ),
            (
                self.save is not None and not writable(self.save),
                f"--save {self.save}: cannot be created there",
            ),
        ]
        for flag, path in (("--train", self.train), ("--valid", self.valid)):
            if path is not None:
                wrong_kind = Path(path).suffix not in SUFFIXES
                checks.append((wrong_kind, f"{flag} {path}: give a file that ends in {suffixes}"))
                checks.append((not Path(path).is_file(), f"{flag} {path}: there is no such file"))
        return [text for wrong, text in checks if wrong] + super().problems()


def writable(folder: str) -> bool:
    """Whether a new folder can be created: its nearest parent that exists is a folder to write
    to."""
    parent = next(parent for parent in Path(folder).absolute().parents if parent.exists())
    return parent.is_dir() and os.access(parent, os.W_OK)


@dataclass(frozen=True)
class Prepared:
    """All that training needs but the model. Built without torch."""

    description: ClassifierDescription
    train: Rows
    valid: Rows
    baseline: float
    """Accuracy of always guessing the most frequent class of the training data."""
    most_frequent: str


def prepare(options: Options) -> Prepared:
    """Read the data and turn it into rows of tokens.

    Raises DatasetError with all that is wrong with checkpoint, tokenizer and files.
    """
    # All problems of checkpoint, tokenizer and files are collected before any is raised.
    problems = []
    try:
        run = configuration(options)
        seq_length = run.model.seq_length if options.seq_length is None else options.seq_length
        problems += length_problems(run, seq_length, least=3 if options.pair_key is None else 5)
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
        raise DatasetError(
            f"{options.train}: a classifier needs two classes, all labels are {classes[0]!r}"
        )
    refuse(unseen_labels(valid, classes))
    labels = [example.label for example in train]
    most_frequent = max(classes, key=labels.count)
    return Prepared(
        ClassifierDescription(
            classes, options.columns, seq_length, config=run, tokenizer_sha256=tokenizer.sha256
        ),
        train=frame(train, tokenizer, special, seq_length=seq_length, classes=classes),
        valid=frame(valid, tokenizer, special, seq_length=seq_length, classes=classes),
        baseline=sum(example.label == most_frequent for example in valid) / len(valid),
        most_frequent=most_frequent,
    )


def configuration(options: Options) -> RunConfig:
    """The configuration of the run that wrote the checkpoint, with the tokenizer of the flags.

    Raises CheckpointError if it cannot be read or is that of a GPT, TokenizerError if a file of the
    tokenizer is not found.
    """
    iteration = options.ckpt_step
    if iteration is None:
        iteration = latest_iteration(options.load)
    folder = None if iteration is None else checkpoint_folder(options.load, iteration)
    if folder is None:
        what = "a checkpoint" if iteration is None else f"the checkpoint of iteration {iteration}"
        raise CheckpointError(f"--load {options.load}: {what} is not there")
    try:
        run = read_config(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: its configuration cannot be read: {error}") from None
    if not run.is_bert:
        raise CheckpointError(
            f"--load {options.load} holds a GPT; give a checkpoint of pretrain_bert.py"
        )
    data = checkpoint_data_config(run.data, tokenizer_fields(options), folder)
    return replace(run, data=data)


def length_problems(run: RunConfig, seq_length: int, least: int) -> list[str]:
    """What is wrong with --seq-length: a row must hold a token of each text, and fit the model's
    positions."""
    learned = run.model.position_embedding_type == "learned_absolute"
    if seq_length < least:
        limit = f"use {least} or more"
    elif learned and seq_length > run.model.positions:
        positions = run.model.positions
        limit = f"the model has {positions} positions; use {positions} or less"
    else:
        return []
    return [f"--seq-length {seq_length}: {limit}, [CLS] and [SEP] among them"]


def train(options: Options, prepared: Prepared) -> None:
    """Train, report each epoch, and save."""
    from megalite.checkpoint.load import Checkpoint
    from megalite.training.finetune import finetune, pretrained_classifier, save_classifier
    from megalite.training.trained import single_process_device

    about = prepared.description
    device = single_process_device(options.device)
    with Checkpoint.open(options.load, options.ckpt_step) as checkpoint:
        model = pretrained_classifier(
            checkpoint, about.config, len(about.classes), config=options, device=device
        )
        print(f"iteration {checkpoint.iteration} of {options.load}, on {device}")
    print_data(prepared)
    for epoch in finetune(model, prepared.train, prepared.valid, config=options):
        print(
            f"epoch {epoch.number}/{options.epochs} "
            f"| training loss {epoch.training_loss:.4f} "
            f"| validation loss {epoch.validation_loss:.4f} "
            f"| accuracy {epoch.accuracy:.4f} | baseline {prepared.baseline:.4f}",
            flush=True,
        )
    print(
        f"accuracy {epoch.accuracy:.4f} on {len(prepared.valid)} validation examples; "
        f"always guessing {prepared.most_frequent!r}, the most frequent class of the "
        f"training data: {prepared.baseline:.4f}"
    )
    if options.save is not None:
        save_classifier(options.save, model, about)
        print(f"saved to {options.save}")


def print_data(prepared: Prepared) -> None:
    """Print what the classifier is trained from."""
    about = prepared.description
    if not about.config.pair_head:
        print(
            "the checkpoint was trained with --bert-pair none and has no pooler: "
            "a new one is trained"
        )
    for name, rows in (("training", prepared.train), ("validation", prepared.valid)):
        print(f"{len(rows)} {name} examples, {rows.cut} of them cut to {about.seq_length} tokens")
    shown = ", ".join(about.classes[:SHOWN_CLASSES])
    more = ", ..." if len(about.classes) > SHOWN_CLASSES else ""
    print(f"{len(about.classes)} classes: {shown}{more}", flush=True)


def main() -> None:
    """Read the flags, report all problems at once (status 2, or 1 for what is in the files),
    train."""
    options = parse_options(Options, __doc__)
    reporting.refuse(options.problems())
    with reporting.failures_reported(DatasetError):
        prepared = prepare(options)

    from megalite.optim.optimizer import NonFiniteGradient
    from megalite.parallel.context import DeviceError

    with reporting.failures_reported(CheckpointError, DeviceError, NonFiniteGradient):
        train(options, prepared)
