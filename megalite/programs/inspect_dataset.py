"""Look into an indexed dataset: sizes, lengths, documents.

    python tools/inspect_dataset.py data/corpus_text_document --documents 2 \\
        --tokenizer-type SentencePieceTokenizer --tokenizer-model data/tokenizer.model

prints the text of its first documents; --random, that of random ones. --verify reads both files
from end to end. It lists index entries that are wrong, negative ids, and ids that are not below the
vocabulary size in the .json, and prints the largest id.
"""

import random
import re
import sys
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import tyro

from megalite.data.config import TokenizerType
from megalite.data.indexed import DatasetError, DatasetInfo, IndexedDataset, spread
from megalite.data.tokenizers import Tokenizer, TokenizerError, build_tokenizer
from megalite.preprocess.indexed_verify import verify
from megalite.system.errors import explain_os_error

SAMPLED = 1 << 20
"""At most this many sequence lengths are read, evenly spaced."""


@dataclass(frozen=True)
class InspectConfig:
    """Look into an indexed dataset."""

    prefix: Annotated[str, tyro.conf.Positional]
    """Prefix of the .bin and .idx files, or one of their names."""
    documents: int = 1
    """Number of documents to print, from the first."""
    random: bool = False
    """Print random documents, different ones at every call."""
    verify: bool = False
    """Check every entry of the index and every id."""
    tokens: int = 64
    """Number of tokens to print of each document."""
    tokenizer_type: TokenizerType | None = None
    """Type of the tokenizer, to print documents as text."""
    tokenizer_model: str | None = None
    """Model file of the tokenizer."""
    vocab_file: str | None = None
    """Vocabulary of the tokenizer."""
    merge_file: str | None = None
    """Merges of the tokenizer."""
    vocab_size: int | None = None
    """Ids of NullTokenizer."""


def tokenizer_of(config: InspectConfig) -> Tokenizer | None:
    """The tokenizer, if one is named. Raises TokenizerError."""
    if config.tokenizer_type is None:
        if config.tokenizer_model or config.vocab_file or config.merge_file or config.vocab_size:
            raise TokenizerError("tokenizer files are given, but no --tokenizer-type")
        return None
    return build_tokenizer(
        config.tokenizer_type,
        config.tokenizer_model,
        config.vocab_file,
        config.merge_file,
        config.vocab_size,
    )


def sizes(dataset: IndexedDataset, info: DatasetInfo | None) -> dict[str, str]:
    """The properties of a dataset, by the name to print."""
    count = len(dataset)
    sampled = spread(count, SAMPLED)
    contiguous = "yes" if dataset.contiguous else "no: sequences share bytes, or leave gaps"
    found = {
        "documents": f"{dataset.num_documents:,}",
        "sequences": f"{count:,}",
        "tokens": f"{dataset.num_tokens:,}",
        "stored as": f"{dataset.dtype.name}, {dataset.bin_size:,} bytes",
        "contiguous": contiguous,
    }
    if count:
        lengths = dataset.lengths[sampled]
        text = f"{lengths.min():,} to {lengths.max():,}, median {np.median(lengths):g}"
        text += f", mean {lengths.mean():.1f}"
        if len(sampled) < count:
            text += f" (of {SAMPLED:,} evenly spaced ones)"
        found["tokens in a sequence"] = text
    if info is None:
        found["made by"] = "not known: there is no .json beside it"
        return found
    end = "none" if info.eod is None else info.eod
    found["made by"] = f"{info.tokenizer_type}, {info.vocab_size:,} ids, end of document {end}"
    found["tokenizer's sha256"] = info.tokenizer_sha256
    answers = {None: "not known", True: "yes", False: "no"}
    found["split into sentences"] = answers[info.sentences]
    found["documents end with it"] = answers[info.append_eod]
    return found


def show(config: InspectConfig, dataset: IndexedDataset, tokenizer: Tokenizer | None) -> None:
    """Print the properties of a dataset, and the documents that are asked for."""
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
    for name, value in sizes(dataset, info).items():
        table.add_row(name, escape(value))
    console = Console(soft_wrap=True)
    console.print(table)
    count = min(config.documents, dataset.num_documents)
    numbers = range(count)
    if config.random:
        numbers = sorted(random.sample(range(dataset.num_documents), count))
    for number in numbers:
        text = document_text(dataset, number, config.tokens, tokenizer)
        console.print(text, markup=False, highlight=False)


def document_text(
    dataset: IndexedDataset, number: int, tokens: int, tokenizer: Tokenizer | None
) -> str:
    """The first tokens of a document, as text or, without a tokenizer, as ids."""
    stream = dataset.tokens(number, number + 1)
    ids = stream.read(0, min(tokens, len(stream))).tolist()
    if tokenizer is None:
        text = " ".join(map(str, ids))
    else:
        foreign = [i for i in ids if not 0 <= i < tokenizer.vocab_size]
        if foreign:
            raise DatasetError(
                f"document {number}: id {foreign[0]}, but the tokenizer has "
                f"{tokenizer.vocab_size} ids"
            )
        text = tokenizer.decode(ids)
    more = " ..." if len(stream) > len(ids) else ""
    return f"document {number}, {len(stream):,} tokens: {text}{more}"


def checked(dataset: IndexedDataset) -> list[str]:
    """The problems that a full check finds. Draws its progress on a terminal's stderr."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("checking", total=1.0)
        found = verify(dataset, lambda share: bar.update(task, completed=share))
    if not found.problems:
        largest = "" if found.largest_id is None else f"; the largest id is {found.largest_id:,}"
        print(
            f"verified: all {len(dataset):,} sequences and {dataset.num_documents:,} documents are "
            f"sound{largest}"
        )
    return found.problems


def main() -> int:
    """Exit status: 0, or 1 when the dataset is damaged, or 2 when the arguments are wrong."""
    config = tyro.cli(InspectConfig, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))
    if min(config.documents, config.tokens) < 0:
        print("error: --documents and --tokens: give numbers of at least 0", file=sys.stderr)
        return 2
    try:
        tokenizer = tokenizer_of(config)
    except (TokenizerError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        dataset = IndexedDataset(re.sub(r"\.(bin|idx|json)$", "", config.prefix))
        show(config, dataset, tokenizer)
        problems = checked(dataset) if config.verify else []
    except DatasetError as error:
        problems = [str(error)]
    except OSError as error:
        problems = [explain_os_error(error)]
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if problems else 0
