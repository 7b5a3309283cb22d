"""Texts, or pairs of texts, with labels: read from .tsv and .jsonl files, and framed for a BERT. Imports no torch."""

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from megalite.data.gpt import Permutation
from megalite.data.indexed import DatasetError
from megalite.data.masking import SpecialIds
from megalite.data.tokenizers import Tokenizer
from megalite.kernels.philox import counters, key_of, philox4x32

SUFFIXES = (".tsv", ".jsonl")
SHOWN_PROBLEMS = 10
Quoting = Literal["csv", "none"]
"""Of .tsv files. csv: "a field in quotes" may hold tabs, line breaks and doubled quotes. none: a quote is a character
like any other."""


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
        """Those that are read."""
        return [name for name in (self.text, self.pair, self.label) if name is not None]


class Example(NamedTuple):
    """One text or pair; what was not asked for is None."""

    text: str
    pair: str | None
    label: str | None


def read_examples(
    path: str, columns: Columns, quoting: Quoting = "csv"
) -> tuple[list[Example], list[str]]:
    """(examples, problems): every line of a .tsv file with a header or of a .jsonl file, by its suffix.

    A problem names file and line: not UTF-8, invalid JSON, another number of columns than the header, a column or key
    that is not there, an empty text or label. Raises OSError when the file cannot be read.
    """
    examples, problems = [], []
    with open(path, "rb") as file:
        lines = _Lines(file)
        rows = (
            _tsv_rows(lines, columns, quoting) if Path(path).suffix == ".tsv" else _json_rows(lines)
        )
        for row in rows:
            try:
                examples.append(_example(row, columns))
            except ValueError as error:
                lines.complain(str(error))
        problems = [f"{path}, {problem}" for problem in lines.problems]
    if not examples and not problems:
        problems = [f"{path}: no examples in it"]
    return examples, problems


class _Lines:
    """The lines of a file as text, and what is wrong with them. A line that is no text is left out."""

    def __init__(self, file: Iterable[bytes]):
        self._file = file
        self.problems: list[str] = []
        self.first = self.number = 0
        """Lines of the row that is being read, from 1."""

    def __iter__(self) -> Iterator[str]:
        for line in self._file:
            self.number += 1
            try:
                yield line.decode("utf-8-sig" if self.number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                self.first = self.number
                self.complain(
                    f"not UTF-8: byte {line[error.start]:#04x} at column {error.start + 1}"
                )

    def complain(self, problem: str) -> None:
        several = self.first < self.number
        self.problems.append(
            f"line{'s' * several} {f'{self.first} to ' * several}{self.number}: {problem}"
        )


def _json_rows(lines: _Lines) -> Iterator[dict]:
    for line in lines:
        lines.first = lines.number
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            reason = (
                f"invalid JSON: {error.msg} at column {error.colno}"
                if line.strip()
                else "the line is empty"
            )
            lines.complain(reason)
        except (ValueError, RecursionError) as error:
            lines.complain(f"JSON that cannot be read: {error}")
        else:
            if isinstance(row, dict):
                yield row
            else:
                lines.complain(f"a JSON object is needed, not {type(row).__name__}")


def _tsv_rows(lines: _Lines, columns: Columns, quoting: Quoting) -> Iterator[dict]:
    """The rows after the header, by its names. A file whose header does not do has no rows."""
    rules = {"quoting": csv.QUOTE_NONE, "quotechar": None} if quoting == "none" else {}
    reader, header = csv.reader(iter(lines), "excel-tab", strict=True, **rules), None
    while True:
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
            advice = (
                "; where quotes are ordinary characters, give --quoting none"
                if quoting == "csv"
                else ""
            )
            lines.complain(f"{error}{advice}")
            continue
        if header is None:
            header = fields
            wrong = [name for name in columns.names if header.count(name) != 1]
            for name in wrong:
                count = f"{header.count(name)} columns" if name in header else "no column"
                lines.complain(f"{count} {name!r} in the header; it has {', '.join(header)}")
            if wrong:
                return
        elif len(fields) != len(header):
            have = f"{len(fields)} columns" if fields else "the line is empty"
            lines.complain(f"{have}; the header has {len(header)} columns")
        else:
            yield dict(zip(header, fields))


def _example(row: dict, columns: Columns) -> Example:
    """The values of a row. Raises ValueError with all that is wrong."""
    problems, values = [], []
    for name in (columns.text, columns.pair, columns.label):
        value = None if name is None else row.get(name)
        if name is not None and name == columns.label and type(value) is int:
            value = str(value)
        if name is not None and name not in row:
            problems.append(f"no key {name!r}; keys here: {', '.join(row) or 'none'}")
        elif name is not None and not isinstance(value, str):
            wanted = "text or a whole number" if name == columns.label else "text"
            problems.append(f"{name!r} is {type(value).__name__}, not {wanted}")
        elif name is not None and not value.strip():
            problems.append(f"{name!r} is empty")
        elif name is not None and any("\ud800" <= c <= "\udfff" for c in value):
            problems.append(f"{name!r}: half of a surrogate pair, no Unicode text")
        values.append(value)
    if problems:
        raise ValueError("; ".join(problems))
    return Example(*values)


def refuse(problems: Sequence[str]) -> None:
    """Raise DatasetError with the first 10 problems and the number of the others, if there are any."""
    if problems:
        more = len(problems) - SHOWN_PROBLEMS
        raise DatasetError(
            "\n  ".join([*problems[:SHOWN_PROBLEMS], *([f"and {more} more"] if more > 0 else [])])
        )


def classes_of(examples: Iterable[Example]) -> list[str]:
    """Their labels, each once: by value when all are whole numbers, else by letter."""
    labels = {example.label for example in examples}
    whole = all(label.removeprefix("-").isdecimal() for label in labels)
    return sorted(labels, key=lambda label: (int(label), label) if whole else label)


def order(n: int, seed: int, *what: str | int) -> np.ndarray:
    """0 .. n - 1 in a random order that depends on the arguments alone: int64 [n]."""
    keys = philox4x32(counters(0, Permutation.ROUNDS), key_of(seed, "classification", *what))[:, 0]
    return Permutation(n, keys.tolist())(np.arange(n)).astype(np.int64)


def hold_out(
    examples: list[Example], share: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """(training, validation): a share of the examples, chosen at random, is held out. Raises DatasetError when that
    leaves one of the two without any."""
    count = round(share * len(examples))
    if not 0 < count < len(examples):
        raise DatasetError(
            f"--valid-share {share:g} of {len(examples)} examples are {count}: validation and training need one at "
            "least. Give another share, or --valid FILE"
        )
    held = np.zeros(len(examples), bool)
    held[order(len(examples), seed, "held out")[:count]] = True
    return [e for e, h in zip(examples, held) if not h], [e for e, h in zip(examples, held) if h]


def unseen_labels(examples: Iterable[Example], classes: list[str]) -> list[str]:
    """A problem for each label of these examples that is no class."""
    return [
        f"label {label!r} is in the validation data but not in the training data, which has {', '.join(classes)}"
        for label in classes_of(examples)
        if label not in classes
    ]


@dataclass(frozen=True)
class Rows:
    """Framed examples: [CLS] A [SEP] or [CLS] A [SEP] B [SEP]."""

    tokens: list[np.ndarray]
    """int64 [length] each."""
    second: list[int]
    """In each, where B begins; its length where there is none."""
    labels: np.ndarray | None
    """int64 [n], numbers of classes."""
    pad: int
    """Id of the padding."""
    cut: int
    """How many lost tokens because they were too long."""

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(self, chosen: np.ndarray) -> dict[str, np.ndarray]:
        """These rows, padded to the longest of them: tokens, token_types (1 for B and its [SEP]), segments (1, padding
        0), all int64 [b, s]."""
        lengths = np.array([len(self.tokens[i]) for i in chosen])[:, None]
        second = np.array([self.second[i] for i in chosen])[:, None]
        column = np.arange(lengths.max())
        tokens = np.full((len(chosen), lengths.max()), self.pad, np.int64)
        tokens[column < lengths] = np.concatenate([self.tokens[i] for i in chosen])
        types = (column >= second) & (column < lengths)
        return {
            "tokens": tokens,
            "token_types": types.astype(np.int64),
            "segments": (column < lengths).astype("i8"),
        }


def frame(
    examples: list[Example],
    tokenizer: Tokenizer,
    special: SpecialIds,
    seq_length: int,
    classes: list[str] | None,
) -> Rows:
    """Encode and frame examples. A text loses tokens at its end, of a pair the longer one first, until the row has
    `seq_length` tokens. classes: their labels, each one of these; None: labels are not read."""
    first = tokenizer.encode_batch([example.text for example in examples]).split()
    paired = examples[0].pair is not None
    other = (
        tokenizer.encode_batch([example.pair for example in examples]).split()
        if paired
        else [None] * len(first)
    )
    cls, sep = np.array([special.cls]), np.array([special.sep])
    tokens, second, cut = [], [], 0
    for a, b in zip(first, other):
        sizes = len(a), len(b) if paired else 0
        room = seq_length - (3 if paired else 2)
        kept = min(sizes[0], max(room - sizes[1], room - room // 2))
        cut += sum(sizes) > room
        a = np.concatenate([cls, a[:kept], sep])
        tokens.append(
            np.concatenate([a, b[: room - kept], sep] if paired else [a]).astype(np.int64)
        )
        second.append(len(a))
    labels = (
        None
        if classes is None
        else np.array([classes.index(example.label) for example in examples])
    )
    return Rows(tokens, second, labels, special.pad, cut)
