"""Texts, or pairs of texts, with labels: read from .tsv and .jsonl files, and framed for a BERT.

Imports no torch.
"""

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from megalite.data.indexed import DatasetError
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
    with open(path, "rb") as file:
        lines = _Lines(file)
        if Path(path).suffix == ".tsv":
            rows = _tsv_rows(lines, columns, quoting)
        else:
            rows = _json_rows(lines)
        for row in rows:
            try:
                examples.append(_example(row, columns))
            except ValueError as error:
                lines.report(str(error))
    problems = [f"{path}, {problem}" for problem in lines.problems]
    if not examples and not problems:
        problems.append(f"{path}: no examples in it")
    return examples, problems


class _Lines:
    """The lines of a file as text, and their problems. A line that is not UTF-8 is left out."""

    def __init__(self, file: Iterable[bytes]):
        self._file = file
        self.problems: list[str] = []
        self.first = 0
        """First line of the row that is being read, from 1."""
        self.number = 0
        """Last line of the row that is being read."""

    def __iter__(self) -> Iterator[str]:
        for line in self._file:
            self.number += 1
            try:
                yield line.decode("utf-8-sig" if self.number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                self.first = self.number
                byte = line[error.start]
                self.report(f"not UTF-8: byte {byte:#04x} at column {error.start + 1}")

    def report(self, problem: str) -> None:
        """Record a problem of the current row."""
        where = f"line {self.number}"
        if self.first < self.number:
            where = f"lines {self.first} to {self.number}"
        self.problems.append(f"{where}: {problem}")


def _json_rows(lines: _Lines) -> Iterator[dict]:
    for line in lines:
        lines.first = lines.number
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if line.strip():
                lines.report(f"invalid JSON: {error.msg} at column {error.colno}")
            else:
                lines.report("the line is empty")
        except (ValueError, RecursionError) as error:
            lines.report(f"JSON that cannot be read: {error}")
        else:
            if isinstance(row, dict):
                yield row
            else:
                lines.report(f"a JSON object is needed, not {type(row).__name__}")


def _tsv_rows(lines: _Lines, columns: Columns, quoting: Quoting) -> Iterator[dict]:
    """The rows after the header, by its names. A file with an invalid header has no rows."""
    rules = {}
    if quoting == "none":
        rules = {"quoting": csv.QUOTE_NONE, "quotechar": None}
    reader = csv.reader(iter(lines), "excel-tab", strict=True, **rules)
    header = None
    while True:
        # Read a row, which may take several lines.
        lines.first = lines.number + 1
        try:
            fields = next(reader)
            if any("\n" in field and "\t" in field for field in fields):
                raise csv.Error(
                    "a field in quotes that holds a line break and a tab; is a quote not closed?"
                )
        except StopIteration:
            return
        except csv.Error as error:
            advice = ""
            if quoting == "csv":
                advice = "; where quotes are ordinary characters, give --quoting none"
            lines.report(f"{error}{advice}")
            continue
        # Check it against the header, which comes first.
        if header is None:
            header = fields
            if not _check_header(header, columns, lines):
                return
        elif not fields:
            lines.report(f"the line is empty; the header has {len(header)} columns")
        elif len(fields) != len(header):
            lines.report(f"{len(fields)} columns; the header has {len(header)} columns")
        else:
            yield dict(zip(header, fields, strict=True))


def _check_header(header: list[str], columns: Columns, lines: _Lines) -> bool:
    """Whether each column that is read is in the header once; reports those that are not."""
    sound = True
    for name in columns.names:
        count = header.count(name)
        if count != 1:
            found = f"{count} columns" if count else "no column"
            lines.report(f"{found} {name!r} in the header; it has {', '.join(header)}")
            sound = False
    return sound


def _example(row: dict, columns: Columns) -> Example:
    """The values of a row. Raises ValueError with all problems."""
    problems = []
    values = []
    for name in (columns.text, columns.pair, columns.label):
        value = None
        if name is not None:
            value = row.get(name)
            is_label = name == columns.label
            if is_label and type(value) is int:
                value = str(value)
            problem = _value_problem(row, name, value, is_label=is_label)
            if problem is not None:
                problems.append(problem)
        values.append(value)
    if problems:
        raise ValueError("; ".join(problems))
    return Example(*values)


def _value_problem(row: dict, name: str, value, *, is_label: bool) -> str | None:
    """What is wrong with the value of a column, if anything."""
    if name not in row:
        return f"no key {name!r}; keys here: {', '.join(row) or 'none'}"
    if not isinstance(value, str):
        wanted = "text or a whole number" if is_label else "text"
        return f"{name!r} is {type(value).__name__}, not {wanted}"
    if not value.strip():
        return f"{name!r} is empty"
    if any("\ud800" <= c <= "\udfff" for c in value):
        return f"{name!r}: half of a surrogate pair, not Unicode text"
    return None


def refuse(problems: Sequence[str]) -> None:
    """Raise DatasetError with the first 10 problems and the number of the others, if any."""
    if not problems:
        return
    shown = list(problems[:SHOWN_PROBLEMS])
    if len(problems) > SHOWN_PROBLEMS:
        shown.append(f"and {len(problems) - SHOWN_PROBLEMS} more")
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


def hold_out(
    examples: list[Example], share: float, seed: int
) -> tuple[list[Example], list[Example]]:
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


def unseen_labels(examples: Iterable[Example], classes: list[str]) -> list[str]:
    """A problem for each label of these examples that is not one of the classes."""
    known = ", ".join(classes)
    problems = []
    for label in classes_of(examples):
        if label not in classes:
            problems.append(
                f"label {label!r} is in the validation data but not in the training data, which "
                f"has {known}"
            )
    return problems


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
        lengths = np.array([len(row) for row in rows])[:, None]
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
    first = tokenizer.encode_batch([example.text for example in examples]).split()
    second = None
    room = seq_length - 2
    if examples[0].pair is not None:
        second = tokenizer.encode_batch([example.pair for example in examples]).split()
        room = seq_length - 3
    tokens = []
    starts = []
    cut = 0
    for number, a in enumerate(first):
        b = [] if second is None else second[number]
        kept = min(len(a), max(room - len(b), room - room // 2))
        cut += len(a) + len(b) > room
        row = [[special.cls], a[:kept], [special.sep]]
        starts.append(kept + 2)
        if second is not None:
            row += [b[: room - kept], [special.sep]]
        tokens.append(np.concatenate(row).astype(np.int64))
    labels = None
    if classes is not None:
        labels = np.array([classes.index(example.label) for example in examples])
    return Rows(tokens, starts, labels, special.pad, cut=cut)
