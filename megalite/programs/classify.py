"""Sort texts into classes by a classifier that tools/finetune_classifier.py saved.

Example: python tools/classify.py --classifier classifier --input new.tsv --output classes.jsonl
"""

import json
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NoReturn

import tyro

from megalite.checkpoint.folder import CheckpointError
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
from megalite.data.indexed import DatasetError
from megalite.data.masking import special_ids
from megalite.data.tokenizers import TokenizerError
from megalite.training.finetune_config import ClassifierDescription


@dataclass(frozen=True)
class Options:
    """What to classify, and by what."""

    classifier: str
    """Folder, as --save of finetune_classifier.py."""
    input: str
    """Texts: .tsv with a header or .jsonl, with the columns or keys that the classifier was trained with."""
    output: str
    """New .jsonl file: for each text in order its label, and the probability that the model gives it."""
    label_key: str | None = None
    """Column or key of the right labels, where the input has them: report the accuracy."""
    quoting: Quoting = "csv"
    """Of .tsv files. csv: a field in quotes may hold tabs and line breaks; none: quotes are ordinary characters."""
    batch_size: int = 32
    """Texts that are classified at a time."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto takes a GPU when there is one."""

    def problems(self) -> list[str]:
        """Everything wrong with these values, each with what would work."""
        checks = [
            (
                not Path(self.classifier).is_dir(),
                f"--classifier {self.classifier}: there is no such folder",
            ),
            (
                Path(self.input).suffix not in SUFFIXES,
                f"--input {self.input}: give a file that ends in {' or '.join(SUFFIXES)}",
            ),
            (not Path(self.input).is_file(), f"--input {self.input}: there is no such file"),
            (
                Path(self.output).exists(),
                f"--output {self.output} exists: give the name of a new file",
            ),
            (
                not Path(self.output).parent.is_dir(),
                f"--output {self.output}: make the folder first: mkdir -p {Path(self.output).parent}",
            ),
            (self.batch_size < 1, f"--batch-size {self.batch_size}: use 1 or more"),
        ]
        return [text for wrong, text in checks if wrong]


def read(options: Options, about: ClassifierDescription) -> tuple[list[Example], Rows]:
    """The texts, as they are and framed. Raises DatasetError with all that is wrong with them, TokenizerError."""
    tokenizer = about.tokenizer()
    examples, problems = read_examples(
        options.input, replace(about.columns, label=options.label_key), options.quoting
    )
    refuse(problems)
    if options.label_key is not None:
        unknown = [label for label in classes_of(examples) if label not in about.classes]
        refuse(
            [
                f"label {label!r} is none of the classes, {', '.join(about.classes)}"
                for label in unknown
            ]
        )
    return examples, frame(examples, tokenizer, special_ids(tokenizer), about.seq_length, None)


def classify(options: Options, about: ClassifierDescription, rows: Rows) -> list[str]:
    """Classify and write. The labels."""
    from megalite.parallel.context import choose_device
    from megalite.parallel.launch import LaunchInfo
    from megalite.training.finetune import load_classifier, scores

    device, _ = choose_device(options.device, LaunchInfo(0, 1, 0, 1, "", "none"))
    model = load_classifier(options.classifier, about, device)
    probabilities, numbers = scores(model, rows, options.batch_size).softmax(dim=1).max(dim=1)
    labels = [about.classes[number] for number in numbers.tolist()]
    draft = Path(f"{options.output}.{os.getpid()}.partial")
    with draft.open("w", encoding="utf-8") as file:
        for label, probability in zip(labels, probabilities.tolist()):
            file.write(
                json.dumps({"label": label, "probability": probability}, ensure_ascii=False) + "\n"
            )
    draft.rename(options.output)
    return labels


def fail(error: Exception) -> NoReturn:
    """End with one line on what is wrong."""
    print(f"classify.py: {error}", file=sys.stderr)
    raise SystemExit(1)


def main() -> None:
    """Read the flags, report all problems at once (status 2, or 1 for what is in the files), classify."""
    options = tyro.cli(Options, description=__doc__)
    if problems := options.problems():
        print("\n".join(f"classify.py: {problem}" for problem in problems), file=sys.stderr)
        raise SystemExit(2)
    try:
        about = ClassifierDescription.read(options.classifier)
        examples, rows = read(options, about)
    except (DatasetError, TokenizerError, OSError) as error:
        fail(error)
    from megalite.parallel.context import DeviceError

    try:
        labels = classify(options, about, rows)
    except (CheckpointError, DeviceError, OSError) as error:
        fail(error)
    print(f"{len(labels)} texts classified, in {options.output}")
    if options.label_key is not None:
        right = sum(label == example.label for label, example in zip(labels, examples))
        print(f"accuracy {right / len(labels):.4f}")
