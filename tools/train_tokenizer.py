"""Train a SentencePiece BPE tokenizer on text.

    python tools/train_tokenizer.py --input corpus.jsonl --vocab-size 8000 --output-prefix data/tokenizer

writes data/tokenizer.model, the same for the same input. Files ending in .jsonl or .json hold one JSON object a line;
any other file is taken as plain text. Decoding gives back exactly the text that was encoded.
"""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's megalite, installed or not

from megalite.data.indexed import DatasetError
from megalite.data.preprocess import BadLineError, parse_block, read_blocks
from megalite.data.tokenizers import TokenizerError, train_sentencepiece


@dataclass(frozen=True)
class TrainTokenizerConfig:
    """Train a SentencePiece BPE tokenizer."""

    input: tuple[str, ...]
    """Files to learn from: JSONL (.jsonl, .json) or plain text."""
    output_prefix: str
    """The model is written to OUTPUT_PREFIX.model."""
    vocab_size: int
    """Entries of the vocabulary, 260 for bytes and special pieces among them."""
    json_key: str = "text"
    """Key of the JSON objects whose text is wanted."""


def find_problems(config: TrainTokenizerConfig) -> list[str]:
    """Everything that is wrong with the arguments, a line each."""
    problems = [f"--input {path}: no such file" for path in config.input if not Path(path).is_file()]
    if not config.input:
        problems.append("--input: give at least one file")
    if config.vocab_size <= 260:
        problems.append(f"--vocab-size {config.vocab_size}: must be above 260, the bytes and special pieces")
    model = Path(f"{config.output_prefix}.model")
    if not model.parent.is_dir():
        problems.append(f"--output-prefix {config.output_prefix}: make the folder first: mkdir -p {model.parent}")
    if model.exists():
        problems.append(f"--output-prefix {config.output_prefix}: {model} exists; delete it or choose another prefix")
    return problems


def read_texts(config: TrainTokenizerConfig) -> Iterator[str]:
    """Every text of the input. Raises BadLineError."""
    for path in config.input:
        for block in read_blocks([path]):
            if Path(path).suffix in (".jsonl", ".json"):
                yield from parse_block(block, (config.json_key,))[0]
                continue
            try:
                yield block.data.decode()
            except UnicodeDecodeError as error:
                line = block.first_line + block.data.count(b"\n", 0, error.start)
                raise BadLineError(f"{path}, line {line}: not UTF-8: {error.reason}") from None


def main() -> int:
    """Exit status 0, 1 when the data is at fault, 2 when the arguments are."""
    config = tyro.cli(TrainTokenizerConfig, description=__doc__)
    problems = find_problems(config)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if problems:
        return 2
    try:
        model = train_sentencepiece(read_texts(config), config.vocab_size)
    except (DatasetError, TokenizerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    path, partial = Path(f"{config.output_prefix}.model"), Path(f"{config.output_prefix}.model.{os.getpid()}.partial")
    partial.write_bytes(model)
    partial.rename(path)
    print(f"{path}: {config.vocab_size} pieces")
    return 0


if __name__ == "__main__":
    sys.exit(main())
