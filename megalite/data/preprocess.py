"""From text to indexed datasets: processes encode blocks of lines, this one writes them in order and can be resumed."""

import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from megalite.data.config import TokenizerType
from megalite.data.encode import EncodedBlock, Encoder, TextReader
from megalite.data.indexed import DatasetError, DatasetInfo, IndexedWriter, dataset_path
from megalite.data.inputs import STDIN, Block, expand, kind_of, read_blocks, shard_ranges, sizes_of
from megalite.data.journal import Journal
from megalite.data.tokenizers import Tokenizer, TokenizerError, build_tokenizer
from megalite.data.workers import encoded_blocks

COMMIT_SECONDS, COMMIT_TOKENS = 5.0, 1 << 25
"""How often an output is put on the disk, to go on from there."""
SHOWN_BAD_LINES = 10


class BadLineError(DatasetError):
    """A line of the input that is no document: names the file, the line and the reason."""


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
    """Language that sentences are split by (--split-sentences), as ISO 639 names it."""
    max_bad_lines: int = 0
    """Lines that are no documents to leave out before giving up; they are listed in OUTPUT_PREFIX.bad_lines.tsv."""
    shard: str | None = None
    """Part I of N, as I/N with I from 0: only this part of the input, into OUTPUT_PREFIX_000I-of-000N. See
    tools/merge_datasets.py."""
    partitions: int = 1
    """Parts to make at once on this machine, each by its share of --workers, and to merge."""
    workers: int = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    """Processes that encode; 1 encodes in the main process. Default: one per core."""

    @property
    def place(self) -> tuple[int, int]:
        """(I, N) of --shard; (0, 1) without it."""
        return tuple(map(int, self.shard.split("/"))) if self.shard else (0, 1)

    @property
    def stem(self) -> str:
        """The output prefix, with the shard in its name."""
        shard, shards = self.place
        return f"{self.output_prefix}_{shard:04d}-of-{shards:04d}" if self.shard else self.output_prefix

    def prefix(self, key: str) -> str:
        """Prefix of the dataset made from a JSON key."""
        return f"{self.stem}_{key}_{'sentence' if self.split_sentences else 'document'}"

    @property
    def folder(self) -> Path:
        """Where the output grows."""
        return Path(f"{self.stem}.partial")


def find_problems(config: PreprocessConfig) -> list[str]:
    """Everything that is wrong with the arguments, a line each, with what would work. Empty: good to start."""
    files, problems = expand(config.input)
    if config.workers < 1:
        problems.append(f"--workers {config.workers}: needs at least 1")
    if config.max_bad_lines < 0:
        problems.append(f"--max-bad-lines {config.max_bad_lines}: needs at least 0")
    if not config.json_keys or len(set(config.json_keys)) < len(config.json_keys):
        problems.append(f"--json-keys {' '.join(config.json_keys)}: needs at least one key, and each once")
    if len(config.json_keys) > 1 and any(kind_of(path) == "text" for path in files):
        problems.append(f"--json-keys {' '.join(config.json_keys)}: .txt files have no keys; give one")
    problems += _shard_problems(config, files) + _output_problems(config)
    try:
        tokenizer = tokenizer_of(config)
        if config.append_eod:
            tokenizer.eod  # noqa: B018 - raises when there is none
    except (TokenizerError, OSError) as error:
        problems.append(str(error))
    if config.split_sentences:
        try:
            _sentence_splitter(config.language)
        except DatasetError as error:
            problems.append(str(error))
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
        problems.append(f"--partitions {config.partitions} and --shard {config.shard}: give one of them")
    if split and STDIN in files:
        problems.append("--input -: standard input cannot be split; leave out --shard and --partitions")
    return problems


def _output_problems(config: PreprocessConfig) -> list[str]:
    problems = []
    folder = dataset_path(config.output_prefix, ".idx").parent
    if not folder.is_dir():
        problems.append(f"--output-prefix {config.output_prefix}: make the folder first: mkdir -p {folder}")
    elif not os.access(folder, os.W_OK):
        problems.append(f"--output-prefix {config.output_prefix}: the folder {folder} is not writable")
    if config.shard is not None and not re.fullmatch(r"\d+/\d+", config.shard):
        return problems
    if not config.folder.exists():  # otherwise a run that was interrupted while it gave files their names goes on
        problems += [
            f"--output-prefix {config.output_prefix}: {path} exists; delete it or choose another prefix"
            for key in dict.fromkeys(config.json_keys)
            for path in (dataset_path(config.prefix(key), suffix) for suffix in (".bin", ".idx", ".json"))
            if path.exists()
        ]
    return problems


def tokenizer_of(config: PreprocessConfig) -> Tokenizer:
    """The tokenizer that encodes. Raises TokenizerError."""
    return build_tokenizer(
        config.tokenizer_type, config.tokenizer_model, config.vocab_file, config.merge_file, config.vocab_size,
        config.tokenizer_backend,
    )  # fmt: skip


def _sentence_splitter(language: str) -> Callable[[str], list[str]]:
    """A function from a text to its sentences. Raises DatasetError when the library is missing."""
    try:
        import sentencex
    except ImportError:
        raise DatasetError("--split-sentences needs the sentencex library: pip install sentencex") from None
    return lambda text: sentencex.segment(language, text)


def build_encoder(config: PreprocessConfig) -> Encoder:
    """What encodes blocks under this configuration. Raises TokenizerError, DatasetError."""
    split = _sentence_splitter(config.language) if config.split_sentences else None
    return Encoder(tokenizer_of(config), config.json_keys, config.append_eod, split)


@dataclass
class Progress:
    """How far a run has come, and where its time went."""

    bytes_total: int
    bytes_done: int = 0
    documents: int = 0
    tokens: int = 0
    seconds: float = 0.0
    bytes_now: int = 0
    """Of those done, the ones of this run; the others are an interrupted one's."""
    tokens_now: int = 0
    spent: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("read", "parse", "encode", "write"), 0.0))
    """Seconds of all processes by what they were spent on."""
    bad_lines: int = 0

    @classmethod
    def total(cls, parts: list["Progress"]) -> "Progress":
        """Of several runs at once, together."""
        summed = ("bytes_total", "bytes_done", "documents", "tokens", "bytes_now", "tokens_now", "bad_lines")
        spent = {name: sum(part.spent[name] for part in parts) for name in parts[0].spent}
        totals = {name: sum(getattr(part, name) for part in parts) for name in summed}
        return cls(**totals, seconds=max(part.seconds for part in parts), spent=spent)

    def __str__(self) -> str:
        rate = self.bytes_now / 1e6 / max(self.seconds, 1e-9)
        return (
            f"{self.bytes_done / 1e6:,.1f} of {self.bytes_total / 1e6:,.1f} MB, {self.documents:,} documents, "
            f"{self.tokens:,} tokens, {rate:,.1f} MB/s, {self.tokens_now / max(self.seconds, 1e-9):,.0f} tokens/s"
        )

    def where(self) -> str:
        """Where the time went, in a line."""
        parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in self.spent.items())
        return f"{self.seconds:.2f} s; seconds of all processes: {parts}"


def preprocess(
    config: PreprocessConfig, report: Callable[[Progress], None] = lambda progress: None
) -> list[DatasetInfo]:
    """Write the datasets of every key and return their descriptions; `report` is called after every block.

    Nothing has its final name before everything is written. What an interrupted run of the same job wrote is kept.
    Raises BadLineError at a line that is no document and one too many, DatasetError when an output exists, an input
    cannot be read, or another job's output is in the way, TokenizerError when the fast tokenizer is wrong.
    """
    if config.partitions > 1:
        from megalite.data.partitions import preprocess_in_partitions

        return preprocess_in_partitions(config, report)
    files, problems = expand(config.input)
    if problems:
        raise DatasetError("; ".join(problems))
    tokenizer = tokenizer_of(config)
    journal = Journal(config.folder, job_of(config, files, tokenizer))
    try:
        if journal.state is None or not journal.state.get("renames"):
            with ExitStack() as stack:
                _Run(config, files, tokenizer, journal, stack).to_the_end(report)
    finally:
        if journal.state is None:
            _remove_if_empty(config.folder)
        journal.close()
    journal.end(journal.state["renames"])
    return [DatasetInfo.read(config.prefix(key)) for key in config.json_keys]


def _remove_if_empty(folder: Path) -> None:
    """Remove a folder from which nothing can go on."""
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def job_of(config: PreprocessConfig, files: list[str], tokenizer: Tokenizer) -> dict:
    """What decides the bytes of the output, to tell whether an interrupted run was this one."""
    stats = [os.stat(path) for path in files if path != STDIN]
    return {
        "input": [[path, stat.st_size, stat.st_mtime_ns] for path, stat in zip(files, stats)] if stats else list(files),
        "tokenizer": [config.tokenizer_type, tokenizer.vocab_size, tokenizer.sha256],
        "json keys": list(config.json_keys),
        "append eod": config.append_eod,
        "sentences": config.language if config.split_sentences else None,
        "shard": config.shard,
        "partitions": config.partitions,
    }


class _Run:
    """The making of one output, from its beginning or from what the journal says."""

    def __init__(
        self, config: PreprocessConfig, files: list[str], tokenizer: Tokenizer, journal: Journal, stack: ExitStack
    ):
        self.config, self.files, self.tokenizer, self.journal, self.stack = config, files, tokenizer, journal, stack
        state = journal.state or {
            "after": [0, 0],
            "line": 1,
            "bad": 0,
            "bad_bytes": 0,
            "writers": [None] * len(config.json_keys),
        }
        if journal.state and STDIN in files:
            raise DatasetError(f"standard input cannot be taken up again: delete {journal.folder} to start anew")
        dtype = np.dtype("<u2" if tokenizer.vocab_size < 65500 else "<i4")
        self.writers = [
            stack.enter_context(IndexedWriter(config.prefix(key), dtype, journal.folder, kept))
            for key, kept in zip(config.json_keys, state["writers"], strict=True)
        ]
        self.after, self.line, self.bad = tuple(state["after"]), state["line"], state["bad"]
        self.bad_file = stack.enter_context(open(journal.folder / "bad_lines.tsv", "r+b" if journal.state else "w+b"))
        self.bad_file.truncate(state["bad_bytes"])
        self.bad_file.seek(state["bad_bytes"])
        self.ranges = shard_ranges(files, *config.place)
        sizes = sizes_of(files)
        total = sum(min(stop, sizes[number]) - start for number, start, stop in self.ranges)
        self.progress = Progress(total, bytes_done=self._bytes_before(self.after, sizes), bad_lines=self.bad)
        self._committed = time.monotonic(), 0

    def _bytes_before(self, after: tuple[int, int], sizes: list[int]) -> int:
        return sum(
            min(stop, sizes[number]) - start if number < after[0] else max(0, min(after[1], sizes[number]) - start)
            for number, start, stop in self.ranges
            if number <= after[0]
        )

    def to_the_end(self, report: Callable[[Progress], None]) -> None:
        """Encode and write what is left, and leave complete files and their renames to the journal."""
        began, progress = time.perf_counter(), self.progress
        blocks = read_blocks(self.files, self.ranges, self.config.json_keys, self.after)
        encoded = self.stack.enter_context(encoded_blocks(self.config.workers, build_encoder, self.config, blocks))
        for block, result in encoded:
            self._write(block, result)
            progress.seconds = time.perf_counter() - began
            report(progress)
        if not self.writers[0].documents and not self.config.shard:
            raise DatasetError(f"{', '.join(self.config.input)}: no documents")
        self._commit()
        renames = [rename for writer in self.writers for rename in writer.seal(self._describe(writer))]
        if self.bad:
            renames.append((self.journal.folder / "bad_lines.tsv", f"{self.config.stem}.bad_lines.tsv"))
        self.journal.commit({"renames": [[str(source), str(final)] for source, final in renames]})
        progress.seconds = time.perf_counter() - began
        report(progress)

    def _write(self, block: Block, result: EncodedBlock) -> None:
        began, progress = time.perf_counter(), self.progress
        self._note_bad_lines(block, result)
        before = sum(writer.tokens for writer in self.writers)
        for writer, lines in zip(self.writers, result.per_key, strict=True):
            counts = np.frombuffer(lines.sequences, "<i4") if self.config.split_sentences else None
            writer.add_documents(lines.ids, np.frombuffer(lines.lengths, "<i4"), counts)
        last_of_file = self.after[0] != block.file
        self.line = (1 if last_of_file else self.line) + result.lines
        self.after = block.file, block.stop
        tokens = sum(writer.tokens for writer in self.writers)
        progress.bytes_done += block.stop - block.start
        progress.bytes_now += block.stop - block.start
        progress.documents, progress.tokens = self.writers[0].documents, tokens
        progress.tokens_now += tokens - before
        when, written = self._committed
        if time.monotonic() - when > COMMIT_SECONDS or progress.tokens_now - written > COMMIT_TOKENS:
            self._commit()
        for name, seconds in zip(("read", "parse", "encode"), result.seconds):
            progress.spent[name] += seconds
        progress.spent["write"] += time.perf_counter() - began

    def _note_bad_lines(self, block: Block, result: EncodedBlock) -> None:
        first = 1 if self.after[0] != block.file else self.line
        for offset, reason in result.bad:
            text = f"{block.path}, line {first + offset}: {reason}"
            self.bad += 1
            if self.bad > self.config.max_bad_lines:
                most = self.config.max_bad_lines
                more = f" This is bad line {self.bad}." if most else ""
                raise BadLineError(f"{text}.{more} --max-bad-lines N leaves out up to N such lines (now {most})")
            self.bad_file.write(f"{block.path}\t{first + offset}\t{reason}\n".encode(errors="replace"))
            if self.bad <= SHOWN_BAD_LINES:
                print(f"left out: {text}", file=sys.stderr)
        self.progress.bad_lines = self.bad

    def _commit(self) -> None:
        self.bad_file.flush()
        os.fsync(self.bad_file.fileno())
        writers = [writer.state() for writer in self.writers]
        state = {"after": self.after, "line": self.line, "bad": self.bad, "bad_bytes": self.bad_file.tell()}
        self.journal.commit({**state, "writers": writers})
        self._committed = time.monotonic(), self.progress.tokens_now

    def _describe(self, writer: IndexedWriter) -> DatasetInfo:
        try:
            eod = self.tokenizer.eod
        except TokenizerError:
            eod = None
        size, digest = self.tokenizer.vocab_size, self.tokenizer.sha256
        return DatasetInfo(self.config.tokenizer_type, size, eod, digest, writer.documents, writer.tokens)


def read_texts(inputs: tuple[str, ...], key: str) -> Iterator[str]:
    """Every text of the inputs, for those who learn from it. Raises BadLineError at a line that is no document."""
    files, problems = expand(inputs)
    if problems:
        raise DatasetError("; ".join(problems))
    reader, file, line = TextReader((key,)), -1, 1
    for block in read_blocks(files, shard_ranges(files, 0, 1), (key,)):
        line = 1 if block.file != file else line
        lines, texts, bad = reader.parse(block.read(), block.is_text)
        if bad:
            raise BadLineError(f"{block.path}, line {line + bad[0][0]}: {bad[0][1]}")
        yield from texts[0]
        file, line = block.file, line + lines


@contextmanager
def show_progress(seconds_between_lines: float = 5.0):
    """Gives a function for `preprocess` that shows progress on stderr: a bar on a terminal, otherwise plain lines."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
        with Bar(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("starting")
            yield lambda p: bar.update(task, description=str(p), completed=p.bytes_done, total=p.bytes_total)
        return
    next_line = seconds_between_lines

    def print_line(progress: Progress) -> None:
        nonlocal next_line
        if progress.seconds >= next_line or progress.bytes_done == progress.bytes_total:
            next_line = progress.seconds + seconds_between_lines
            print(progress, file=sys.stderr, flush=True)

    yield print_line
