"""Show and check an indexed dataset: sizes, lengths, documents.

    python tools/inspect_dataset.py data/corpus_text_document --documents 2 \\
        --tokenizer-type SentencePieceTokenizer --tokenizer-model data/tokenizer.model

shows the text of its first documents, with --random that of others. --verify reads both files from
end to end and reports every invalid entry of the index, negative ids, and ids that are not below
the vocabulary size in the .json.
"""

import random
import re
import sys
from dataclasses import dataclass
from typing import Annotated

import numpy as np

from megalite.config.cli import parse_options
from megalite.data.config import TokenizerType
from megalite.data.indexed import DatasetError, DatasetInfo, IndexedDataset
from megalite.data.tokenizers import Tokenizer, TokenizerError, build_tokenizer, tokenizer_fields
from megalite.fields import Field
from megalite.preprocess.indexed_verify import verify
from megalite.programs.reporting import failures_reported, print_errors

SAMPLED = 1 << 20
"""Sequences whose lengths are read: all of them, or evenly spaced ones."""
ANSWERS = {None: "not recorded", True: "yes", False: "no"}


@dataclass(frozen=True)
class InspectConfig:
    """Look into an indexed dataset."""

    prefix: Annotated[str, Field(positional=True)]
    """Prefix of the .bin and .idx files, or one of their names."""
    documents: Annotated[int, Field(minimum=0)] = 1
    """Number of documents to print, from the first."""
    random: bool = False
    """Print random documents, different ones at every call."""
    verify: bool = False
    """Check every entry of the index and every id."""
    tokens: Annotated[int, Field(minimum=0)] = 64
    """Number of tokens to print of each document."""
    tokenizer_type: TokenizerType | None = None
    """Type of the tokenizer, to print documents as text."""
    tokenizer_model: str | None = None
    """Model file of the tokenizer."""
    vocab_file: str | None = None
    """Vocabulary of the tokenizer."""
    merge_file: str | None = None
    """Merges of the tokenizer."""
    tiktoken_pattern: str | None = None
    """Pattern and special tokens of a TikTokenizer. Unset: known from the file."""
    vocab_size: int | None = None
    """Ids of NullTokenizer."""


def tokenizer_of(config: InspectConfig) -> Tokenizer | None:
    """The tokenizer, if one is named. Raises TokenizerError."""
    if config.tokenizer_type is None:
        if config.tokenizer_model or config.vocab_file or config.merge_file or config.vocab_size:
            raise TokenizerError("tokenizer files are given, but no --tokenizer-type")
        return None
    return build_tokenizer(**tokenizer_fields(config), vocab_size=config.vocab_size)


def sizes(dataset: IndexedDataset) -> dict[str, str]:
    """The sizes of a dataset, by name."""
    gaps = "no: sequences share bytes, or leave gaps"
    shown = {
        "documents": f"{dataset.num_documents:,}",
        "sequences": f"{len(dataset):,}",
        "tokens": f"{dataset.num_tokens:,}",
        "stored as": f"{dataset.dtype.name}, {dataset.bin_size:,} bytes",
        "contiguous": "yes" if dataset.contiguous else gaps,
    }
    if len(dataset):
        shown["tokens in a sequence"] = lengths(dataset)
    return shown


def lengths(dataset: IndexedDataset) -> str:
    """Minimum, maximum, median and mean of the lengths of sequences; for many, of an evenly spaced
    sample."""
    count = len(dataset)
    positions = np.arange(min(count, SAMPLED))
    note = ""
    if count > SAMPLED:
        positions = positions * (count - 1) // (SAMPLED - 1)
        note = f" (of {SAMPLED:,} evenly spaced ones)"
    sample = dataset.lengths[positions]
    return (
        f"{int(sample.min()):,} to {int(sample.max()):,}, median {float(np.median(sample)):g}, "
        f"mean {sample.mean():.1f}{note}"
    )


def origin(info: DatasetInfo | None) -> dict[str, str]:
    """How a dataset was made, by name, as its .json says."""
    if info is None:
        return {"made by": "unknown: there is no .json file beside it"}
    end = "none" if info.eod is None else info.eod
    return {
        "made by": f"{info.tokenizer_type}, {info.vocab_size:,} ids, end of document {end}",
        "tokenizer's sha256": info.tokenizer_sha256,
        "split into sentences": ANSWERS[info.sentences],
        "documents end with it": ANSWERS[info.append_eod],
        "special tokens in texts parsed": ANSWERS[info.parse_special_tokens],
    }


def show(config: InspectConfig, dataset: IndexedDataset, tokenizer: Tokenizer | None) -> None:
    """Print a table of sizes, then the documents.

    Raises DatasetError when the tokenizer is not the one that made the dataset.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    info = DatasetInfo.read(dataset.prefix)
    if tokenizer is not None and info is not None and info.tokenizer_sha256 != tokenizer.sha256:
        raise DatasetError(
            f"{dataset.prefix} was made with another tokenizer, a {info.tokenizer_type} of "
            f"{info.vocab_size:,} ids. Give that one to see its text, or none to see ids"
        )
    table = Table(title=escape(dataset.prefix), show_header=False)
    for name, value in (sizes(dataset) | origin(info)).items():
        table.add_row(name, escape(value))
    console = Console(soft_wrap=True)
    console.print(table)
    for number in chosen_documents(config, dataset.num_documents):
        text = shown_document(dataset, number, config.tokens, tokenizer)
        console.print(text, markup=False, highlight=False)


def chosen_documents(config: InspectConfig, available: int) -> list[int]:
    """Numbers of the documents to show, in ascending order."""
    count = min(config.documents, available)
    return sorted(random.sample(range(available), count)) if config.random else list(range(count))


def shown_document(
    dataset: IndexedDataset, number: int, tokens: int, tokenizer: Tokenizer | None
) -> str:
    """The beginning of a document, as text or, without a tokenizer, as ids.

    Raises DatasetError for an id that the tokenizer does not have.
    """
    stream = dataset.tokens(number, number + 1)
    ids = [int(i) for i in stream.read(0, min(tokens, len(stream)))]
    if tokenizer is None:
        text = " ".join(map(str, ids))
    else:
        foreign = [i for i in ids if not 0 <= i < tokenizer.vocab_size]
        if foreign:
            known = f"but the tokenizer has {tokenizer.vocab_size} ids"
            raise DatasetError(f"document {number}: id {foreign[0]}, {known}")
        text = tokenizer.decode(ids)
    more = " ..." if len(stream) > len(ids) else ""
    return f"document {number}, {len(stream):,} tokens: {text}{more}"


def checked(dataset: IndexedDataset) -> list[str]:
    """The problems that a full check finds; its progress is shown on a terminal's stderr."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("checking", total=1.0)
        found = verify(dataset, lambda share: bar.update(task, completed=share))
    if not found.problems:
        largest = "" if found.largest_id is None else f"; the largest id is {found.largest_id:,}"
        sizes = f"{len(dataset):,} sequences and {dataset.num_documents:,} documents"
        print(f"verified: all {sizes} are sound{largest}")
    return found.problems


def main() -> int:
    """Exit status 0, 1 when the dataset is damaged, 2 when the arguments are at fault."""
    config = parse_options(InspectConfig, __doc__)
    with failures_reported(status=2):
        tokenizer = tokenizer_of(config)
    with failures_reported():
        dataset = IndexedDataset(re.sub(r"\.(bin|idx|json)$", "", config.prefix))
        show(config, dataset, tokenizer)
        problems = checked(dataset) if config.verify else []
    print_errors(problems)
    return 1 if problems else 0
