"""The configuration of preprocessing, and every check that can be made before the work starts."""

import importlib.util
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from megalite.data.config import TokenizerType
from megalite.data.indexed import dataset_path
from megalite.data.tokenizers import Tokenizer, TokenizerError, build_tokenizer, tokenizer_fields
from megalite.preprocess.inputs import STDIN, expand, is_text
from megalite.system.errors import error_message


@dataclass(frozen=True)
class PreprocessConfig:
    """Turn text into indexed datasets: PREFIX_KEY_document.bin, .idx, .json for each JSON key."""

    input: tuple[str, ...]
    """JSONL files (.gz, .xz and .zst too), .txt files of one document each, .parquet files, folders
    of these, patterns such as 'data/*.jsonl', or - for JSON lines on standard input. Read in this
    order."""
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
    """Number of ids, the end-of-document id among them (NullTokenizer)."""
    tokenizer_backend: Literal["auto", "reference", "fast"] = "auto"
    """fast: gigatoken encodes, and a sample of every block is compared with the reference library's
    ids. auto: fast if gigatoken supports the tokenizer."""
    json_keys: tuple[str, ...] = ("text",)
    """Keys of the JSON objects, or columns, that hold the text."""
    append_eod: bool = False
    """End every document with the tokenizer's end-of-document token."""
    split_sentences: bool = False
    """Make each sentence a sequence of its own, in PREFIX_KEY_sentence."""
    language: str = "en"
    """Language whose rules split sentences (--split-sentences), as an ISO 639 code. The library
    splits a language that it has no rules for as English."""
    max_bad_lines: int = 0
    """Bad lines (not JSON, no such key, not UTF-8, ...) to leave out before the job fails. They are
    listed in OUTPUT_PREFIX.bad_lines.tsv."""
    skip_empty: bool = False
    """Leave out blank lines and documents with an empty text. They are counted, and are no bad
    lines."""
    shard: str | None = None
    """Shard I of N, as I/N with I from 0: process only this shard of the input, and write
    OUTPUT_PREFIX_000I-of-000N. See tools/merge_datasets.py."""
    partitions: int = 1
    """Shards to make at the same time on this machine, with --workers divided among them, and then
    to merge."""
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
        """The fields, without the tokenizer: another process builds its own."""
        state = dict(self.__dict__)
        state.pop("tokenizer", None)
        return state

    @property
    def shard_is_sound(self) -> bool:
        """Whether --shard is I/N with I below N, or not given."""
        match = re.fullmatch(r"(\d+)/(\d+)", self.shard or "0/1")
        return match is not None and int(match[1]) < int(match[2])

    @property
    def shard_position(self) -> tuple[int, int]:
        """(I, N) of --shard I/N; (0, 1) without it."""
        index, count = map(int, (self.shard or "0/1").split("/"))
        return index, count

    @property
    def stem(self) -> str:
        """The output prefix, with the shard in its name."""
        if self.shard is None:
            return self.output_prefix
        index, count = self.shard_position
        return f"{self.output_prefix}_{index:04d}-of-{count:04d}"

    def prefix(self, key: str) -> str:
        """Prefix of the dataset made from a JSON key."""
        return f"{self.stem}_{key}_{'sentence' if self.split_sentences else 'document'}"

    @property
    def bad_lines(self) -> str:
        """The file that lists the bad lines that were left out."""
        return f"{self.stem}.bad_lines.tsv"

    @property
    def staging_dir(self) -> Path:
        """Folder in which the output files grow until they are complete."""
        return Path(f"{self.stem}.partial")

    def existing_outputs(self) -> list[str]:
        """Output files that exist already."""
        outputs = []
        for key in dict.fromkeys(self.json_keys):
            outputs += [f"{self.prefix(key)}{suffix}" for suffix in (".bin", ".idx", ".json")]
        return list(filter(os.path.exists, [*outputs, self.bad_lines]))


def find_problems(config: PreprocessConfig) -> list[str]:
    """Every problem of the arguments, one line each, with a value that would work. Empty: sound."""
    files, problems = expand(config.input)
    problems += _problems(config, files)
    problems += _output_problems(config)
    return problems


def _problems(config: PreprocessConfig, files: list[str]) -> Iterator[str]:
    kind = config.tokenizer_type
    keys = " ".join(config.json_keys)
    partitions = f"--partitions {config.partitions}"
    # Numbers and keys.
    if config.workers < 1:
        yield f"--workers {config.workers}: needs at least 1"
    if config.max_bad_lines < 0:
        yield f"--max-bad-lines {config.max_bad_lines}: needs at least 0"
    if not config.json_keys or len(set(config.json_keys)) < len(config.json_keys):
        yield f"--json-keys {keys}: needs at least one key, and each once"
    if len(config.json_keys) > 1 and any(map(is_text, files)):
        yield f"--json-keys {keys}: .txt files have no keys; give one"
    # Shards.
    if config.partitions < 1:
        yield f"{partitions}: needs at least 1"
    if not config.shard_is_sound:
        yield f"--shard {config.shard}: needs I/N with I from 0 to N - 1, such as 0/8"
    if config.partitions > 1 and config.shard is not None:
        yield f"{partitions} and --shard {config.shard}: give one of them"
    if (config.partitions > 1 or config.shard is not None) and STDIN in files:
        yield "--input -: standard input cannot be split; leave out --shard and --partitions"
    # The tokenizer.
    if config.vocab_size is not None and kind != "NullTokenizer":
        yield f"--vocab-size {config.vocab_size}: a {kind} knows its own; leave the flag out"
    try:
        _ = config.tokenizer.eod if config.append_eod else config.tokenizer
    except (TokenizerError, OSError) as error:
        yield error_message(error)
    # Sentences.
    given = f"--language {config.language}"
    if not config.split_sentences:
        if config.language != "en":
            yield f"{given} has no effect without --split-sentences"
        return
    if importlib.util.find_spec("sentencex") is None:
        yield "--split-sentences needs the sentencex library: pip install sentencex"
    if not re.fullmatch("[a-z]{2,3}(-[a-z]+)*", config.language):
        yield f"{given}: needs an ISO 639 code in small letters, such as en or de"


def _output_problems(config: PreprocessConfig) -> Iterator[str]:
    given = f"--output-prefix {config.output_prefix}"
    folder = dataset_path(config.output_prefix, ".idx").parent
    if not folder.is_dir():
        yield f"{given}: make the folder first: mkdir -p {folder}"
    elif not os.access(folder, os.W_OK):
        yield f"{given}: the folder {folder} is not writable"
    # With a staging directory, outputs may exist because a run was interrupted while it renamed
    # them: that run resumes. A shard that is not sound gives no output names.
    if config.shard_is_sound and not config.staging_dir.exists():
        for path in config.existing_outputs():
            yield f"{given}: {path} exists; delete it or choose another prefix"
