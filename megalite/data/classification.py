"""Texts, or pairs of texts, with labels: read from .tsv and .jsonl files, and framed for a BERT.

Imports no torch.
"""

import csv
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from megalite.data import masking
from megalite.data.indexed import DatasetError
from megalite.data.json_lines import json_object, text_problem
from megalite.data.masking import SpecialIds
from megalite.data.permutation import Permutation
from megalite.data.tokenizers import Tokenizer
from megalite.kernels.philox import counters, key_of, philox4x32

SUFFIXES = (".tsv", ".jsonl")
SHOWN_PROBLEMS = 10
Quoting = Literal["csv", "none"]
"""Of .tsv files. csv: "a field in quotes" may hold tabs, line breaks and doubled quotes. none:
quotes are ordinary characters."""


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a .tsv file, or keys of the objects of a .jsonl file."""

    text: str
    pair: str | None = None
    """Of the second text. None: there is none."""
    label: str | None = None
    """None: labels are not read."""

    @property
    def names(self) -> list[str]:
        """The columns that are read."""
        return [name for name in (self.text, self.pair, self.label) if name is not None]


class Example(NamedTuple):
    """One text or pair of texts. None: not read."""

    text: str
    pair: str | None
    label: str | None


def read_examples(
    path: str, columns: Columns, quoting: Quoting = "csv"
) -> tuple[list[Example], list[str]]:
    """(examples, problems) of a .tsv file with a header or a .jsonl file, by its suffix.

    A problem names file and line: not UTF-8, invalid JSON, another number of columns than the
    header, a missing column or key, an empty text or label. Raises OSError when the file cannot be
    read.
    """
    examples = []
    problems = []
    rows = None
    with open(path, "rb") as file:
        lines = _Lines(file)
        while True:
            first = lines.number + 1
            try:
                if rows is not None:
                    examples.append(_example(next(rows), columns))
                elif Path(path).suffix == ".tsv":
                    rows = _tsv_rows(lines, columns, quoting)
                else:
                    rows = map(json_object, lines)
            except StopIteration:
                break
            except (ValueError, csv.Error) as error:
                where = f"line {lines.number}"
                if first < lines.number:
                    where = f"lines {first} to {lines.number}"
                advice = ""
                if isinstance(error, csv.Error) and quoting == "csv":
                    advice = "; where quotes are ordinary characters, give --quoting none"
                problems.append(f"{path}, {where}: {error}{advice}")
                if rows is None:  # the header is invalid
                    break
    if not examples and not problems:
        problems.append(f"{path}: no examples in it")
    return examples, problems


class _Lines:
    """The lines of a file as text. Raises ValueError for one that is not UTF-8, and continues."""

    def __init__(self, file: Iterator[bytes]):
        self._file = file
        self.number = 0
        """Number of the last line, from 1."""

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = next(self._file)
        self.number += 1
        try:
            return line.decode("utf-8-sig" if self.number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            byte = line[error.start]
            where = f"column {error.start + 1}"
            raise ValueError(f"not UTF-8: byte {byte:#04x} at {where}") from None


def _tsv_rows(lines: _Lines, columns: Columns, quoting: Quoting) -> Iterator[dict]:
    """The rows after the header, by its names; a row that is invalid raises an error in its turn.

    Raises ValueError or csv.Error for an invalid header.
    """
    rules = {"quoting": csv.QUOTE_NONE, "quotechar": None} if quoting == "none" else {}
    reader = csv.reader(lines, "excel-tab", strict=True, **rules)
    header = next(reader)
    wrong = []
    for name in columns.names:
        if name not in header:
            wrong.append(f"no column {name!r}")
        elif header.count(name) > 1:
            wrong.append(f"{header.count(name)} columns {name!r}")
    if wrong:
        raise ValueError(f"{', '.join(wrong)} in the header; it has {', '.join(header)}")

    def row(fields: list[str]) -> dict:
        if any("\n" in field and "\t" in field for field in fields):
            raise csv.Error(
                "a field in quotes that holds a line break and a tab; is a quote not closed?"
            )
        if len(fields) != len(header):
            found = f"{len(fields)} columns" if fields else "the line is empty"
            raise ValueError(f"{found}; the header has {len(header)} columns")
        return dict(zip(header, fields, strict=True))

    return map(row, reader)


def _example(row: dict, columns: Columns) -> Example:
    """The values of a row. Raises ValueError with all problems."""
    if type(row.get(columns.label)) is int:
        row[columns.label] = str(row[columns.label])
    problems = []
    for name in columns.names:
        wanted = "text or a whole number" if name == columns.label else "text"
        problem = text_problem(row, name, wanted)
        if problem is None and not row[name].strip():
            problem = f"{name!r} is empty"
        if problem is None and re.search("[\ud800-\udfff]", row[name]):
            problem = f"{name!r}: half of a surrogate pair, not Unicode text"
        if problem:
            problems.append(problem)
    if problems:
        raise ValueError("; ".join(problems))
    return Example(row[columns.text], row.get(columns.pair), row.get(columns.label))


def refuse(problems: Iterable[str]) -> None:
    """Raise DatasetError with the first 10 problems and the number of the others, if any."""
    shown = list(problems)
    more = len(shown) - SHOWN_PROBLEMS
    if more > 0:
        shown[SHOWN_PROBLEMS:] = [f"and {more} more"]
    if shown:
        raise DatasetError("\n  ".join(shown))


def classes_of(examples: Iterable[Example]) -> list[str]:
    """Their labels, each once: by value when all are whole numbers, else in alphabetical order."""
    labels = sorted({example.label for example in examples})
    if all(label.removeprefix("-").isdecimal() for label in labels):
        labels.sort(key=int)
    return labels


def order(n: int, seed: int, *what: str | int) -> np.ndarray:
    """0 .. n - 1 in a random order that depends on the arguments alone: int64 [n]."""
    keys = philox4x32(counters(0, Permutation.ROUNDS), key_of(seed, "classification", *what))[:, 0]
    return Permutation(n, keys.tolist())(np.arange(n)).astype(np.int64)


def hold_out(examples: list[Example], share: float, seed: int) -> tuple[list, list]:
    """(training, validation): a share of the examples, chosen at random, becomes validation data.

    Raises DatasetError when that leaves one of the two empty.
    """
    count = round(share * len(examples))
    if not 0 < count < len(examples):
        raise DatasetError(
            f"--valid-share {share:g} of {len(examples)} examples is {count}: validation and "
            "training need at least one each. Give another share, or --valid FILE"
        )
    chosen = set(order(len(examples), seed, "held out")[:count].tolist())
    training = []
    validation = []
    for number, example in enumerate(examples):
        (validation if number in chosen else training).append(example)
    return training, validation


def unseen_labels(examples: Iterable[Example], classes: list[str]) -> Iterator[str]:
    """A problem for each label of these examples that is not one of the classes."""
    for label in classes_of(examples):
        if label not in classes:
            yield (
                f"label {label!r} is in the validation data but not in the training data, which "
                f"has {', '.join(classes)}"
            )


@dataclass(frozen=True)
class Rows:
    """Framed examples: [CLS] A [SEP] or [CLS] A [SEP] B [SEP]."""

    tokens: list[np.ndarray]
    """int64 [length] each."""
    second: list[int]
    """Position in each at which B begins; its length when there is no B."""
    labels: np.ndarray | None
    """Class indices, int64 [n]. None: labels were not read."""
    pad: int
    """Id of the padding."""
    cut: int
    """Number of rows that were truncated."""

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(self, chosen: np.ndarray) -> dict[str, np.ndarray]:
        """These rows, padded to the longest of them.

        tokens; token_types, 1 for B and its [SEP]; segments, 1, and 0 for padding: int64 [b, s].
        """
        rows = [self.tokens[i] for i in chosen]
        lengths = np.array(list(map(len, rows)))[:, None]
        second = np.array([self.second[i] for i in chosen])[:, None]
        column = np.arange(lengths.max())
        tokens = np.full((len(rows), lengths.max()), self.pad, np.int64)
        tokens[column < lengths] = np.concatenate(rows)
        types = (column >= second) & (column < lengths)
        return {
            "tokens": tokens,
            "token_types": types.astype(np.int64),
            "segments": (column < lengths).astype(np.int64),
        }


def frame(
    examples: list[Example],
    tokenizer: Tokenizer,
    special: SpecialIds,
    seq_length: int,
    classes: list[str] | None,
) -> Rows:
    """Encode and frame examples, truncated to `seq_length` tokens.

    Tokens are removed from the end of a text; in a pair, from the longer one first. classes: the
    labels of the examples, by class index. None: labels are not read.
    """
    texts, pairs, given_labels = zip(*examples)
    is_pair = pairs[0] is not None
    room = seq_length - (3 if is_pair else 2)
    first = tokenizer.encode_batch(texts).split()
    second = tokenizer.encode_batch(pairs).split() if is_pair else [()] * len(first)
    tokens = []
    starts = []
    cut = 0
    for a, b in zip(first, second):
        kept = min(len(a), max(room - len(b), room - room // 2))
        cut += len(a) + len(b) > room
        starts.append(kept + 2)
        kept_texts = [a[:kept], b[: room - kept]] if is_pair else [a[:kept]]
        tokens.append(masking.frame(special, *kept_texts))
    labels = None
    if classes is not None:
        labels = np.array(list(map(classes.index, given_labels)))
    return Rows(tokens, starts, labels, special.pad, cut=cut)
