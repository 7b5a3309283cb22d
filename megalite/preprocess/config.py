"""What a preprocessing is told, and everything that can be wrong with it."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from megalite.data.config import TokenizerType
from megalite.data.indexed import DatasetError, dataset_path
from megalite.data.tokenizers import Tokenizer, TokenizerError, build_tokenizer, tokenizer_fields
from megalite.preprocess.inputs import STDIN, expand, is_text


@dataclass(frozen=True)
class PreprocessConfig:
    """Turn text into indexed datasets: one PREFIX_KEY_document.bin, .idx and .json for each JSON key."""

    input: tuple[str, ...]
    """JSONL files (.gz, .xz and .zst too), .txt files of one document each, .parquet files, folders of these, patterns
    such as 'data/*.jsonl', or - for JSON lines on standard input. Taken in this order."""
    output_prefix: str
    """Path and beginning of the output files' names."""
    tokenizer_type: TokenizerType
    """Kind of tokenizer."""
    tokenizer_model: str | None = None
    """Model file of the tokenizer (SentencePieceTokenizer, HuggingFaceTokenizer, TikTokenizer)."""
    vocab_file: str | None = None
    """Vocabulary of the tokenizer (GPT2BPETokenizer, BertWordPiece*)."""
    merge_file: str | None = None
    """Merges of the tokenizer (GPT2BPETokenizer)."""
    tiktoken_pattern: str | None = None
    """How TikTokenizer splits text, and its special tokens: r50k_base, cl100k_base, o200k_base,
    llama3, llama4, qwen, qwen3.5, or v1 or v2 of Megatron-LM. Unset: known from the file."""
    parse_special_tokens: bool = False
    """Take the text of a special token, such as <|endoftext|>, for that token."""
    vocab_size: int | None = None
    """Ids, and one that ends documents (NullTokenizer)."""
    tokenizer_backend: Literal["auto", "reference", "fast"] = "auto"
    """fast: gigatoken encodes, and the reference library a sample of every block, to compare. auto: fast if it can."""
    json_keys: tuple[str, ...] = ("text",)
    """Keys of the JSON objects, or columns, whose text is wanted."""
    append_eod: bool = False
    """End every document with the tokenizer's end-of-document token."""
    split_sentences: bool = False
    """Make each sentence a sequence of its own, in PREFIX_KEY_sentence."""
    language: str = "en"
    """Language that sentences are split by (--split-sentences), by its ISO 639 code. The library splits a language that
    it has no rules for as English."""
    max_bad_lines: int = 0
    """Lines that are no documents to leave out before giving up; they are listed in OUTPUT_PREFIX.bad_lines.tsv."""
    shard: str | None = None
    """Part I of N, as I/N with I from 0: only this part of the input, into OUTPUT_PREFIX_000I-of-000N. See
    tools/merge_datasets.py."""
    partitions: int = 1
    """TrainingComponents to make at once on this machine, each by its share of --workers, and to merge."""
    workers: int = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    """Processes that encode; 1 encodes in the main process. Default: one per core."""

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that encodes, built once. Raises TokenizerError."""
        return build_tokenizer(
            **tokenizer_fields(self), vocab_size=self.vocab_size, backend=self.tokenizer_backend
        )

    def __getstate__(self) -> dict:
        """What another process needs to know; it builds a tokenizer of its own."""
        return {name: value for name, value in self.__dict__.items() if name != "tokenizer"}

    @property
    def place(self) -> tuple[int, int]:
        """(I, N) of --shard; (0, 1) without it."""
        return tuple(map(int, self.shard.split("/"))) if self.shard else (0, 1)

    @property
    def stem(self) -> str:
        """The output prefix, with the shard in its name."""
        shard, shards = self.place
        return (
            f"{self.output_prefix}_{shard:04d}-of-{shards:04d}"
            if self.shard
            else self.output_prefix
        )

    def prefix(self, key: str) -> str:
        """Prefix of the dataset made from a JSON key."""
        return f"{self.stem}_{key}_{'sentence' if self.split_sentences else 'document'}"

    @property
    def bad_lines(self) -> str:
        """The file that lists the lines that were left out."""
        return f"{self.stem}.bad_lines.tsv"

    def existing_outputs(self) -> list[str]:
        """Files that this would write and that are there already."""
        datasets = (
            dataset_path(self.prefix(key), s)
            for key in self.json_keys
            for s in (".bin", ".idx", ".json")
        )
        return list(
            dict.fromkeys(str(path) for path in (*datasets, Path(self.bad_lines)) if path.exists())
        )

    @property
    def folder(self) -> Path:
        """Where the output grows."""
        return Path(f"{self.stem}.partial")


def find_problems(config: PreprocessConfig) -> list[str]:
    """Everything that is wrong with the arguments, a line each, with what would work. Empty: good to start."""
    files, problems = expand(config.input)
    if config.vocab_size is not None and config.tokenizer_type != "NullTokenizer":
        problems.append(
            f"--vocab-size {config.vocab_size}: a {config.tokenizer_type} knows its own; leave the flag out"
        )
    if config.workers < 1:
        problems.append(f"--workers {config.workers}: needs at least 1")
    if config.max_bad_lines < 0:
        problems.append(f"--max-bad-lines {config.max_bad_lines}: needs at least 0")
    if not config.json_keys or len(set(config.json_keys)) < len(config.json_keys):
        problems.append(
            f"--json-keys {' '.join(config.json_keys)}: needs at least one key, and each once"
        )
    if len(config.json_keys) > 1 and any(map(is_text, files)):
        problems.append(
            f"--json-keys {' '.join(config.json_keys)}: .txt files have no keys; give one"
        )
    problems += _shard_problems(config, files) + _output_problems(config)
    try:
        tokenizer = config.tokenizer
        if config.append_eod:
            tokenizer.eod  # noqa: B018 - raises when there is none
    except (TokenizerError, OSError) as error:
        problems.append(str(error))
    if config.split_sentences:
        try:
            sentence_splitter(config.language)
        except DatasetError as error:
            problems.append(str(error))
        if not re.fullmatch("[a-z]{2,3}(-[a-z]+)*", config.language):
            problems.append(
                f"--language {config.language}: needs an ISO 639 code in small letters, such as en or de"
            )
    elif config.language != "en":
        problems.append(f"--language {config.language} has no effect without --split-sentences")
    return problems


def _shard_problems(config: PreprocessConfig, files: list[str]) -> list[str]:
    problems = []
    if config.shard is not None:
        match = re.fullmatch(r"(\d+)/(\d+)", config.shard)
        if not match or int(match[1]) >= int(match[2]):
            return [f"--shard {config.shard}: needs I/N with I from 0 to N - 1, such as 0/8"]
    if config.partitions < 1:
        problems.append(f"--partitions {config.partitions}: needs at least 1")
    split = config.partitions > 1 or config.shard is not None
    if config.partitions > 1 and config.shard is not None:
        problems.append(
            f"--partitions {config.partitions} and --shard {config.shard}: give one of them"
        )
    if split and STDIN in files:
        problems.append(
            "--input -: standard input cannot be split; leave out --shard and --partitions"
        )
    return problems


def _output_problems(config: PreprocessConfig) -> list[str]:
    problems = []
    folder = dataset_path(config.output_prefix, ".idx").parent
    if not folder.is_dir():
        problems.append(
            f"--output-prefix {config.output_prefix}: make the folder first: mkdir -p {folder}"
        )
    elif not os.access(folder, os.W_OK):
        problems.append(
            f"--output-prefix {config.output_prefix}: the folder {folder} is not writable"
        )
    if config.shard is not None and not re.fullmatch(r"\d+/\d+", config.shard):
        return problems
    if (
        not config.folder.exists()
    ):  # otherwise a run that was interrupted while it gave files their names goes on
        problems += [
            f"--output-prefix {config.output_prefix}: {path} exists; delete it or choose another prefix"
            for path in config.existing_outputs()
        ]
    return problems


def sentence_splitter(language: str) -> Callable[[str], list[str]]:
    """A function from a text to its sentences. Raises DatasetError when the library is missing."""
    try:
        import sentencex
    except ImportError:
        raise DatasetError(
            "--split-sentences needs the sentencex library: pip install sentencex"
        ) from None
    return lambda text: sentencex.segment(language, text)
