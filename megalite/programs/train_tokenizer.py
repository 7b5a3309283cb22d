"""Train a tokenizer: SentencePiece (BPE or unigram), GPT-2's byte-level BPE, BERT's WordPiece.

    python tools/train_tokenizer.py --input corpus.jsonl --vocab-size 8000 \\
        --output-prefix data/tokenizer

writes data/tokenizer.model, the same for the same input. It reads the files that
tools/preprocess_data.py reads: JSON lines, plain or compressed, .txt, .parquet, folders of these.
SentencePiece holds all of the text in memory: give it a sample of a large corpus.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megalite.config.cli import parse_options
from megalite.data.tokenizers import train_bpe, train_sentencepiece, train_wordpiece
from megalite.preprocess.inputs import STDIN, expand
from megalite.preprocess.run import read_texts
from megalite.programs.reporting import failures_reported, refuse

OUTPUTS = {
    "sentencepiece-bpe": (".model",),
    "sentencepiece-unigram": (".model",),
    "bpe": ("-vocab.json", "-merges.txt"),
    "wordpiece": ("-vocab.txt",),
}
"""Suffixes of the files that each kind writes."""
LEAST = {"sentencepiece-bpe": 260, "sentencepiece-unigram": 260, "bpe": 257, "wordpiece": 5}
"""Entries that each kind has before training: bytes and special pieces."""


@dataclass(frozen=True)
class TrainTokenizerConfig:
    """Train a tokenizer."""

    input: tuple[str, ...]
    """Files to learn from, as tools/preprocess_data.py takes them."""
    output_prefix: str
    """Written: OUTPUT_PREFIX.model (SentencePiece), OUTPUT_PREFIX-vocab.json and -merges.txt (bpe),
    or OUTPUT_PREFIX-vocab.txt (wordpiece)."""
    vocab_size: int
    """Entries of the vocabulary, bytes and special pieces among them."""
    kind: Literal["sentencepiece-bpe", "sentencepiece-unigram", "bpe", "wordpiece"] = (
        "sentencepiece-bpe"
    )
    """For --tokenizer-type SentencePieceTokenizer (the first two), GPT2BPETokenizer (bpe) or
    BertWordPieceCase (wordpiece; with --lowercase BertWordPieceLowerCase)."""
    lowercase: bool = False
    """Learn from lower-cased text without accents (wordpiece only)."""
    json_key: str = "text"
    """Key of the JSON objects whose text is wanted."""
    skip_empty: bool = False
    """Pass over blank lines and empty texts."""

    @property
    def outputs(self) -> list[Path]:
        """The files to write."""
        return [Path(self.output_prefix + suffix) for suffix in OUTPUTS[self.kind]]


def find_problems(config: TrainTokenizerConfig) -> list[str]:
    """Everything that is wrong with the arguments, a line each."""
    _, problems = expand(config.input)
    least = LEAST[config.kind]
    if config.vocab_size <= least:
        size = f"--vocab-size {config.vocab_size}"
        problems.append(f"{size}: must be above {least}, the bytes and special pieces")
    kind = f"--kind {config.kind}"
    if config.kind == "wordpiece" and STDIN in config.input:
        once = "standard input can be read once; give a file"
        problems.append(f"--input -: {kind} reads the text twice, {once}")
    if config.lowercase and config.kind != "wordpiece":
        problems.append(f"--lowercase: {kind} keeps text as it is; only wordpiece can lower it")
    folder = Path(config.output_prefix).parent
    given = f"--output-prefix {config.output_prefix}"
    if not folder.is_dir():
        problems.append(f"{given}: make the folder first: mkdir -p {folder}")
    for path in filter(Path.exists, config.outputs):
        problems.append(f"{given}: {path} exists; delete it or choose another prefix")
    return problems


@dataclass(frozen=True)
class Texts:
    """Every text of the input; can be iterated several times. Raises BadLineError while
    iterating."""

    config: TrainTokenizerConfig

    def __iter__(self) -> Iterator[str]:
        config = self.config
        return read_texts(config.input, config.json_key, skip_empty=config.skip_empty)


def train(config: TrainTokenizerConfig) -> tuple[bytes, ...]:
    """The contents of the outputs. Raises TokenizerError, DatasetError."""
    texts = Texts(config)
    if config.kind == "bpe":
        return train_bpe(texts, config.vocab_size)
    if config.kind == "wordpiece":
        return (train_wordpiece(texts, config.vocab_size, config.lowercase),)
    model_type = config.kind.removeprefix("sentencepiece-")
    return (train_sentencepiece(texts, config.vocab_size, model_type),)


def write(contents: tuple[bytes, ...], paths: list[Path]) -> None:
    """Write all files or none: they get their names when all are complete."""
    partial = [path.with_name(f"{path.name}.{os.getpid()}.partial") for path in paths]
    try:
        for path, content in zip(partial, contents):
            path.write_bytes(content)
        for source, path in zip(partial, paths):
            source.rename(path)
    finally:
        for path in partial:
            path.unlink(missing_ok=True)


def main() -> None:
    """Exit status 0, 1 when the data is at fault, 2 when the arguments are."""
    config = parse_options(TrainTokenizerConfig, __doc__)
    refuse(find_problems(config))
    with failures_reported():
        write(train(config), config.outputs)
    print(f"{' and '.join(map(str, config.outputs))}: {config.vocab_size} pieces")
