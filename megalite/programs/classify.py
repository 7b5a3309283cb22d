"""Classify texts by a classifier that tools/finetune_classifier.py saved.

Example: python tools/classify.py --classifier classifier --input new.tsv --output classes.jsonl
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from megalite.config.cli import parse_options
from megalite.data.classification import (
    SUFFIXES,
    Example,
    Quoting,
    Rows,
    classes_of,
    frame,
    read_examples,
    refuse,
)
from megalite.data.masking import special_ids
from megalite.fields import Field
from megalite.programs.reporting import failures_reported
from megalite.training.finetune_config import ClassifierDescription


@dataclass(frozen=True)
class Options:
    """What to classify, and by what."""

    classifier: str
    """Folder, as --save of finetune_classifier.py."""
    input: str
    """Texts: .tsv with a header or .jsonl, with the columns or keys that the classifier was trained
    with."""
    output: str
    """New .jsonl file: for each text in order its label, and the probability that the model gives
    it."""
    label_key: str | None = None
    """Column or key of the true labels, where the input has them: report the accuracy."""
    quoting: Quoting = "csv"
    """Of .tsv files. csv: a field in quotes may hold tabs and line breaks; none: quotes are
    ordinary characters."""
    batch_size: Annotated[int, Field(minimum=1)] = 32
    """Texts that are classified at a time."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto takes a GPU when there is one."""

    def problems(self) -> Iterator[str]:
        """What is wrong with these values, each with a fix."""
        output = Path(self.output)
        if not Path(self.classifier).is_dir():
            yield f"--classifier {self.classifier}: there is no such folder"
        yield from input_problems("--input", self.input)
        if output.exists():
            yield f"--output {output} exists: give the name of a new file"
        if not output.parent.is_dir():
            yield f"--output {output}: make the folder first: mkdir -p {output.parent}"


def input_problems(flag: str, path: str) -> Iterator[str]:
    """What is wrong with a file of texts, as far as its name shows."""
    if Path(path).suffix not in SUFFIXES:
        yield f"{flag} {path}: give a file that ends in {' or '.join(SUFFIXES)}"
    if not Path(path).is_file():
        yield f"{flag} {path}: there is no such file"


def read(options: Options, about: ClassifierDescription) -> tuple[list[Example], Rows]:
    """The texts, and the rows of tokens made of them.

    Raises DatasetError with all that is wrong with the texts, TokenizerError when the tokenizer is
    not the classifier's.
    """
    tokenizer = about.tokenizer()
    columns = replace(about.columns, label=options.label_key)
    examples, problems = read_examples(options.input, columns, options.quoting)
    refuse(problems)
    if options.label_key is not None:
        classes = ", ".join(about.classes)
        unknown = [label for label in classes_of(examples) if label not in about.classes]
        refuse([f"label {label!r} is none of the classes, {classes}" for label in unknown])
    special = special_ids(tokenizer)
    rows = frame(examples, tokenizer, special, seq_length=about.seq_length, classes=None)
    return examples, rows


def classify(options: Options, about: ClassifierDescription, rows: Rows) -> list[str]:
    """Write label and probability of each row to the output file; returns the labels."""
    from megalite.training.finetune import load_classifier, scores
    from megalite.training.load_model import single_process_device

    device = single_process_device(options.device)
    model = load_classifier(options.classifier, about, device)
    probabilities, numbers = scores(model, rows, options.batch_size).softmax(dim=1).max(dim=1)
    labels = [about.classes[number] for number in numbers.tolist()]
    # The file gets its name when it is complete.
    draft = Path(f"{options.output}.{os.getpid()}.partial")
    with draft.open("w", encoding="utf-8") as file:
        for label, probability in zip(labels, probabilities.tolist()):
            line = {"label": label, "probability": probability}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    draft.rename(options.output)
    return labels


def main() -> None:
    """Read the flags, report all problems at once (status 2, or 1 for what is in the files),
    classify."""
    options = parse_options(Options, __doc__, check=Options.problems)
    with failures_reported():
        about = ClassifierDescription.read(options.classifier)
        examples, rows = read(options, about)
        labels = classify(options, about, rows)
    print(f"{len(labels)} texts classified, in {options.output}")
    if options.label_key is not None:
        right = sum(label == example.label for label, example in zip(labels, examples))
        print(f"accuracy {right / len(labels):.4f}")
