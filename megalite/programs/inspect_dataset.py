"""Look into an indexed dataset: sizes, lengths, documents.

    python tools/inspect_dataset.py data/corpus_text_document --documents 2 \\
        --tokenizer-type SentencePieceTokenizer --tokenizer-model data/tokenizer.model

shows the text of its first documents, --random that of some others. --verify reads both files from end to end and tells
every entry of the index that cannot be, and ids that are not below the vocabulary of the .json.
"""

import random
import re
import sys
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import tyro

from megalite.data.config import TokenizerType
from megalite.data.indexed import DatasetError, DatasetInfo, IndexedDataset
from megalite.data.tokenizers import Tokenizer, TokenizerError, build_tokenizer
from megalite.preprocess.indexed_verify import verify

SAMPLED = 1 << 20
"""Sequences whose lengths are looked at: all of them, or evenly spaced ones."""


@dataclass(frozen=True)
class InspectConfig:
    """Look into an indexed dataset."""

    prefix: Annotated[str, tyro.conf.Positional]
    """Prefix of the .bin and .idx files, or one of their names."""
    documents: int = 1
    """Documents to show, the first ones."""
    random: bool = False
    """Show random documents, others every time."""
    verify: bool = False
    """Check every entry of the index, and every id."""
    tokens: int = 64
    """Ids, or so many tokens of text, to show of each document."""
    tokenizer_type: TokenizerType | None = None
    """Kind of tokenizer, to show documents as text."""
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
            raise TokenizerError("files of a tokenizer are given, but no --tokenizer-type")
        return None
    return build_tokenizer(
        config.tokenizer_type,
        config.tokenizer_model,
        config.vocab_file,
        config.merge_file,
        config.vocab_size,
    )


def sizes(dataset: IndexedDataset, info: DatasetInfo | None) -> dict[str, str]:
    """What to tell of a dataset, by name."""
    count = len(dataset)
    places = (
        np.arange(count) if count <= SAMPLED else np.arange(SAMPLED) * (count - 1) // (SAMPLED - 1)
    )
    lengths = dataset.lengths[places]
    told = {
        "documents": f"{dataset.num_documents:,}",
        "sequences": f"{count:,}",
        "tokens": f"{dataset.num_tokens:,}",
        "stored as": f"{dataset.dtype.name}, {dataset.bin_path.stat().st_size:,} bytes",
        "contiguous": "yes" if dataset.contiguous else "no: sequences share bytes, or leave gaps",
    }
    if count:
        of = "" if count <= SAMPLED else f" (of {SAMPLED:,} evenly spaced ones)"
        low, middle, high = int(lengths.min()), float(np.median(lengths)), int(lengths.max())
        told["tokens in a sequence"] = (
            f"{low:,} to {high:,}, median {middle:g}, mean {lengths.mean():.1f}{of}"
        )
    if info is None:
        told["made by"] = "not known: there is no .json beside it"
    else:
        end = "none" if info.eod is None else info.eod
        told["made by"] = f"{info.tokenizer_type}, {info.vocab_size:,} ids, end of document {end}"
        told["tokenizer's sha256"] = info.tokenizer_sha256
        for name, value in (
            ("split into sentences", info.sentences),
            ("documents end with it", info.append_eod),
        ):
            told[name] = {None: "not told", True: "yes", False: "no"}[value]
    return told


def show(config: InspectConfig, dataset: IndexedDataset, tokenizer: Tokenizer | None) -> None:
    """Print what is asked for."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    info = DatasetInfo.read(dataset.prefix)
    if tokenizer is not None and info is not None and info.tokenizer_sha256 != tokenizer.sha256:
        raise DatasetError(
            f"{dataset.prefix} was made with another tokenizer, a {info.tokenizer_type} of {info.vocab_size:,} ids. "
            "Name that one to see its text, or none to see ids"
        )
    table = Table(title=escape(dataset.prefix), show_header=False)
    for name, value in sizes(dataset, info).items():
        table.add_row(name, escape(value))
    console = Console(soft_wrap=True)
    console.print(table)
    every = range(dataset.num_documents)
    count = min(config.documents, len(every))
    for number in sorted(random.sample(every, count)) if config.random else every[:count]:
        stream = dataset.tokens(number, number + 1)
        ids = [int(i) for i in stream.read(0, min(config.tokens, len(stream)))]
        if tokenizer is not None and (
            foreign := [i for i in ids if not 0 <= i < tokenizer.vocab_size]
        ):
            raise DatasetError(
                f"document {number}: id {foreign[0]}, but the tokenizer has {tokenizer.vocab_size} ids"
            )
        text = " ".join(map(str, ids)) if tokenizer is None else tokenizer.decode(ids)
        more = " ..." if len(stream) > len(ids) else ""
        console.print(
            f"document {number}, {len(stream):,} tokens: {text}{more}",
            markup=False,
            highlight=False,
        )


def checked(dataset: IndexedDataset) -> list[str]:
    """The problems of a full check; its progress on a terminal's stderr."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("checking", total=1.0)
        return verify(dataset, lambda share: bar.update(task, completed=share))


def main() -> int:
    """Exit status 0, 1 when the dataset is damaged, 2 when the arguments are at fault."""
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
    except (DatasetError, OSError) as error:
        problems = [str(error)]
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if config.verify and not problems:
        print(
            f"verified: all {len(dataset):,} sequences and {dataset.num_documents:,} documents are sound"
        )
    return 1 if problems else 0
