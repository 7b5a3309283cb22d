"""Look into an indexed dataset: what it holds, whether it is sound, and some of its documents.

    python tools/inspect_dataset.py data/corpus_text_document --documents 3
    python tools/inspect_dataset.py data/corpus_text_document --verify
    python tools/inspect_dataset.py data/corpus_text_document --documents 3 --random \\
        --tokenizer-type SentencePieceTokenizer --tokenizer-model data/tokenizer.model

Opening a dataset checks a sample of its index. --verify checks every entry, and every id against PREFIX.json.
"""

import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's megalite, installed or not

from megalite.data.indexed import DatasetError, DatasetInfo, IndexedDataset
from megalite.data.tokenizers import Tokenizer, TokenizerError, TokenizerType, build_tokenizer

MEASURED, SPACED = 1_000_000, 10_000
"""Documents whose lengths are looked at: all up to the first number, of more than that the second, evenly spaced."""


@dataclass(frozen=True)
class InspectConfig:
    """What to look at."""

    prefix: Annotated[str, tyro.conf.Positional]
    """Prefix of the .bin and .idx files."""
    verify: bool = False
    """Check every entry of the index, and every id: reads both files from end to end."""
    documents: int = 0
    """Documents to show, the first ones."""
    random: bool = False
    """Show random documents, others in every run, in place of the first."""
    ids: int = 64
    """Tokens to show of each document, from its beginning."""
    tokenizer_type: TokenizerType | None = None
    """Tokenizer to show text with, beside ids."""
    tokenizer_model: str | None = None
    """File of the tokenizer, for the types that have one."""
    vocab_file: str | None = None
    """Vocabulary of the tokenizer, for the types that have one."""
    merge_file: str | None = None
    """Merges of the tokenizer (GPT2BPETokenizer)."""


def find_problems(config: InspectConfig) -> list[str]:
    """Everything that is wrong with the arguments, a line each."""
    problems = [f"--{name} {n}: needs at least {least}" for name, n, least in
                (("documents", config.documents, 0), ("ids", config.ids, 1)) if n < least]  # fmt: skip
    if config.random and not config.documents:
        problems.append("--random chooses which documents to show: give --documents N")
    if config.tokenizer_type == "NullTokenizer":
        problems.append("--tokenizer-type NullTokenizer has no text but the ids, which are shown anyway: leave it out")
    return problems


def named_tokenizer(config: InspectConfig) -> Tokenizer | None:
    """The tokenizer asked for. Raises TokenizerError."""
    files = {name: getattr(config, name) for name in ("tokenizer_model", "vocab_file", "merge_file")}
    if config.tokenizer_type in (None, "NullTokenizer"):
        if any(files.values()):
            raise TokenizerError("the tokenizer's files say nothing without --tokenizer-type")
        return None
    return build_tokenizer(config.tokenizer_type, **files)


def table_of(data: IndexedDataset, info: DatasetInfo | None) -> Table:
    """Counts, sizes, document lengths, and the description."""
    table = Table("what", "how much", title=escape(data.prefix), title_justify="left")
    table.columns[1].overflow = "fold"
    for name, count in (("documents", data.num_documents), ("sequences", len(data)), ("tokens", data.num_tokens)):
        table.add_row(name, f"{count:,}")
    table.add_row("ids stored as", data.dtype.name)
    table.add_row("bytes, .bin", f"{data.bin_path.stat().st_size:,}")
    table.add_row("bytes, .idx", f"{data.index_path.stat().st_size:,}")
    table.add_row(
        "one after another", "yes" if data.contiguous else "no: gaps, or sequences shared or in another order"
    )
    table.add_row("fingerprint", data.fingerprint())
    table.add_section()
    lengths = document_lengths(data)
    of = "all" if len(lengths) == data.num_documents else f"{len(lengths):,} evenly spaced"
    for name, measure in (("least", np.min), ("median", np.median), ("mean", np.mean), ("most", np.max)):
        if len(lengths):
            table.add_row(f"tokens a document, {name} of {of}", f"{measure(lengths):,.10g}")
    table.add_section()
    for name, value in vars(info).items() if info else [(".json", "none: not said which tokenizer made it")]:
        table.add_row(name.replace("_", " ") + (", .json" if info else ""), escape(str(value)))
    return table


def document_lengths(data: IndexedDataset) -> np.ndarray:
    """Tokens of the documents that are looked at, int64."""
    count = data.num_documents
    chosen = np.arange(count) if count <= MEASURED else np.arange(SPACED) * (count - 1) // (SPACED - 1)
    bounds = zip(data.document_indices[chosen].tolist(), data.document_indices[chosen + 1].tolist(), strict=True)
    return np.array([data.lengths[first:last].sum(dtype=np.int64) for first, last in bounds], np.int64)


def show_documents(console: Console, data: IndexedDataset, config: InspectConfig, tokenizer: Tokenizer | None) -> None:
    """The ids of some documents, and their text."""
    count = min(config.documents, data.num_documents)
    chosen = sorted(random.sample(range(data.num_documents), count)) if config.random else range(count)
    for i in chosen:
        stream = data.tokens(i, i + 1)
        ids = stream.read(0, min(config.ids, len(stream))).tolist()
        more = f" ... {len(stream) - len(ids):,} more" if len(stream) > len(ids) else ""
        console.print(f"\ndocument {i}, {len(stream):,} tokens", style="bold", highlight=False)
        console.print(" ".join(map(str, ids)) + more, highlight=False)
        if tokenizer is not None:
            console.print(repr(text_of(ids, tokenizer)), markup=False, highlight=False)


def text_of(ids: list[int], tokenizer: Tokenizer) -> str:
    """Their text. Raises DatasetError for an id that is not the tokenizer's."""
    outside = [i for i in ids if not 0 <= i < tokenizer.vocab_size]
    if outside:
        raise DatasetError(f"id {outside[0]}: the tokenizer has {tokenizer.vocab_size} entries; it is another one")
    return tokenizer.decode(ids)


def verify(data: IndexedDataset) -> list[str]:
    """The problems of a full check, with its progress on a terminal's stderr."""
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("checking", total=1.0)
        return data.verify(lambda share: bar.update(task, completed=share))


def main() -> int:
    """Exit status 0, 1 when the data is at fault, 2 when the arguments are."""
    config = tyro.cli(InspectConfig, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))
    problems, tokenizer = find_problems(config), None
    try:
        tokenizer = named_tokenizer(config)
    except (TokenizerError, OSError) as error:
        problems.append(str(error))
    if problems:
        print(*(f"error: {problem}" for problem in problems), sep="\n", file=sys.stderr)
        return 2
    console = Console(soft_wrap=True)
    try:
        data = IndexedDataset(config.prefix)
        console.print(table_of(data, DatasetInfo.read(config.prefix)))
        show_documents(console, data, config, tokenizer)
        found = verify(data) if config.verify else []
    except (DatasetError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for problem in found:
        print(f"error: {problem}", file=sys.stderr)
    if config.verify and not found:
        print(f"\nchecked: every entry of the index{' and every id' if DatasetInfo.read(config.prefix) else ''}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
