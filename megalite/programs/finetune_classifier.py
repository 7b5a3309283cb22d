"""Train a classifier of texts, or of pairs of texts, on a pretrained BERT, in one process, whatever the layout that
wrote the checkpoint. tools/classify.py uses what --save keeps.

Example: python tools/finetune_classifier.py --load checkpoints --train train.tsv --valid valid.tsv --save classifier
"""

import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import tyro

from megalite.checkpoint.folder import CheckpointError, checkpoint_folder, latest_iteration
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
from megalite.data.tokenizers import TokenizerError, with_tokenizer
from megalite.training.finetune_config import ClassifierDescription, FinetuneConfig, bert_tokenizer

SHOWN_CLASSES = 20


@dataclass(frozen=True)
class Options:
    """What to train, from what, and how."""

    load: str
    """Folder of checkpoints, as --save of pretrain_bert.py."""
    train: str
    """Examples to train with: .tsv with a header, or .jsonl."""
    valid: str | None = None
    """Examples to validate with, in place of --valid-share."""
    valid_share: float | None = None
    """Share of the training examples to validate with, chosen at random by the seed, in place of --valid."""
    save: str | None = None
    """New folder for the classifier as it is after the last epoch. Unset: it is not kept."""
    text_key: str = "text"
    """Column, or key of the JSON objects, that holds the text."""
    pair_key: str | None = None
    """The same of a second text, for pairs."""
    label_key: str = "label"
    """The same of the label: any text or whole number."""
    quoting: Quoting = "csv"
    """Of .tsv files. csv: a field in quotes may hold tabs and line breaks; none: quotes are ordinary characters."""
    seq_length: int | None = None
    """Tokens that a text or pair is cut to, [CLS] and [SEP] among them. Unset: the checkpoint's."""
    config: Annotated[FinetuneConfig, tyro.conf.arg(name="")] = field(
        default_factory=FinetuneConfig
    )
    ckpt_step: int | None = None
    """Iteration to load. Unset: the latest."""
    tokenizer_type: (
        Literal["BertWordPieceLowerCase", "BertWordPieceCase", "HuggingFaceTokenizer"] | None
    ) = None
    """Tokenizer. Unset: the one in the checkpoint's configuration."""
    vocab_file: str | None = None
    """Its vocab.txt (BertWordPiece*). Unset: the one in the checkpoint's configuration."""
    tokenizer_model: str | None = None
    """Its tokenizer.json (HuggingFaceTokenizer). Unset: the one in the checkpoint's configuration."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto takes a GPU when there is one."""

    @property
    def columns(self) -> Columns:
        """What is read of the files."""
        return Columns(self.text_key, self.pair_key, self.label_key)

    def problems(self) -> list[str]:
        """Everything wrong with these values, each with what would work."""
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
                len(set(self.columns.names)) < len(self.columns.names),
                f"--text-key, --pair-key and --label-key must differ: they are {', '.join(self.columns.names)}",
            ),
            (
                self.save is not None and Path(self.save).exists(),
                f"--save {self.save} exists: give the name of a new folder",
            ),
            (
                self.save is not None and not writable(self.save),
                f"--save {self.save}: not a place to write to",
            ),
        ]
        for flag, path in (("--train", self.train), ("--valid", self.valid)):
            if path is not None:
                wrong_kind = Path(path).suffix not in SUFFIXES
                checks.append(
                    (wrong_kind, f"{flag} {path}: give a file that ends in {' or '.join(SUFFIXES)}")
                )
                checks.append((not Path(path).is_file(), f"{flag} {path}: there is no such file"))
        return [text for wrong, text in checks if wrong] + self.config.problems()


def writable(folder: str) -> bool:
    """Whether a new folder can be made there: its nearest parent that exists is a folder to write to."""
    parent = next(parent for parent in Path(folder).absolute().parents if parent.exists())
    return parent.is_dir() and os.access(parent, os.W_OK)


@dataclass(frozen=True)
class Prepared:
    """All that training needs but the model. Made without torch."""

    description: ClassifierDescription
    train: Rows
    valid: Rows
    baseline: float
    """Accuracy of always guessing the most frequent class of the training data."""
    most_frequent: str


def prepare(options: Options) -> Prepared:
    """Read and frame the data. Raises DatasetError with all that is wrong with checkpoint, tokenizer and files."""
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
    if options.valid is None:
        train, valid = hold_out(train, options.valid_share, options.config.seed)
    classes = classes_of(train)
    if len(classes) < 2:
        raise DatasetError(
            f"{options.train}: a classifier needs two classes, all labels are {classes[0]!r}"
        )
    refuse(unseen_labels(valid, classes))
    labels = [example.label for example in train]
    most_frequent = max(classes, key=labels.count)
    return Prepared(
        ClassifierDescription(classes, options.columns, seq_length, run, tokenizer.sha256),
        frame(train, tokenizer, special, seq_length, classes),
        frame(valid, tokenizer, special, seq_length, classes),
        sum(example.label == most_frequent for example in valid) / len(valid),
        most_frequent,
    )


def configuration(options: Options) -> RunConfig:
    """That of the run which wrote the checkpoint, with the tokenizer of the flags. Raises CheckpointError."""
    iteration = (
        options.ckpt_step if options.ckpt_step is not None else latest_iteration(options.load)
    )
    folder = checkpoint_folder(options.load, iteration) if iteration is not None else None
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
    given = {
        name: getattr(options, name) for name in ("tokenizer_type", "vocab_file", "tokenizer_model")
    }
    return replace(run, data=with_tokenizer(run.data, given))


def length_problems(run: RunConfig, seq_length: int, least: int) -> list[str]:
    """A row must hold a token of each text, and fit the model's positions."""
    most = (
        run.model.positions
        if run.model.position_embedding_type == "learned_absolute"
        else seq_length
    )
    if least <= seq_length <= most:
        return []
    limit = (
        f"use {least} or more"
        if seq_length < least
        else f"the model has {most} positions; use {most} or less"
    )
    return [f"--seq-length {seq_length}: {limit}, [CLS] and [SEP] among them"]


def train(options: Options, prepared: Prepared) -> None:
    """Train, report each epoch, and save."""
    from megalite.checkpoint.load import Checkpoint
    from megalite.parallel.context import choose_device
    from megalite.parallel.launch import LaunchInfo
    from megalite.training.finetune import finetune, pretrained_classifier, save_classifier

    about = prepared.description
    device, _ = choose_device(options.device, LaunchInfo(0, 1, 0, 1, "", "none"))
    with Checkpoint.open(options.load, options.ckpt_step) as checkpoint:
        model = pretrained_classifier(
            checkpoint, about.config, len(about.classes), options.config, device
        )
        print(f"iteration {checkpoint.iteration} of {options.load}, on {device}")
    if not about.config.pair_head:
        print(
            "the checkpoint was trained with --bert-pair none and has no pooler: a new one is trained"
        )
    for name, rows in (("training", prepared.train), ("validation", prepared.valid)):
        print(f"{len(rows)} {name} examples, {rows.cut} of them cut to {about.seq_length} tokens")
    shown = (
        about.classes
        if len(about.classes) <= SHOWN_CLASSES
        else [*about.classes[:SHOWN_CLASSES], "..."]
    )
    print(f"{len(about.classes)} classes: {', '.join(shown)}", flush=True)
    for epoch in finetune(model, prepared.train, prepared.valid, options.config):
        print(
            f"epoch {epoch.number}/{options.config.epochs} | training loss {epoch.training_loss:.4f} | validation loss "
            f"{epoch.validation_loss:.4f} | accuracy {epoch.accuracy:.4f} | baseline {prepared.baseline:.4f}",
            flush=True,
        )
    print(
        f"accuracy {epoch.accuracy:.4f} on {len(prepared.valid)} validation examples; always guessing "
        f"{prepared.most_frequent!r}, the most frequent class of the training data: {prepared.baseline:.4f}"
    )
    if options.save is not None:
        save_classifier(options.save, model, about)
        print(f"saved to {options.save}")


def fail(error: Exception) -> NoReturn:
    """End with one line on what is wrong."""
    print(f"finetune_classifier.py: {error}", file=sys.stderr)
    raise SystemExit(1)


def main() -> None:
    """Read the flags, report all problems at once (status 2, or 1 for what is in the files), train."""
    options = tyro.cli(Options, description=__doc__)
    if problems := options.problems():
        print(
            "\n".join(f"finetune_classifier.py: {problem}" for problem in problems), file=sys.stderr
        )
        raise SystemExit(2)
    try:
        prepared = prepare(options)
    except (DatasetError, OSError) as error:
        fail(error)
    from megalite.optim.optimizer import NonFiniteGradient
    from megalite.parallel.context import DeviceError

    try:
        train(options, prepared)
    except (CheckpointError, DeviceError, NonFiniteGradient, OSError) as error:
        fail(error)
