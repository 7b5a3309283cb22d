"""From JSONL to indexed datasets: several processes encode blocks of lines, this one reads and writes them in order."""

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from megalite.data.indexed import DatasetError, DatasetInfo, IndexedWriter, dataset_path
from megalite.data.tokenizers import Tokenizer, TokenizerError, build_tokenizer

BLOCK_BYTES = 1 << 20
"""Whole lines of about this size are encoded at a time."""
BLOCKS_AHEAD = 4
"""Blocks per worker that may be read before the oldest is written: what bounds memory."""


class BadLineError(DatasetError):
    """A line of the input that is no document: names the file, the line and the reason."""


@dataclass(frozen=True)
class PreprocessConfig:
    """Turn JSONL into indexed datasets: one PREFIX_KEY_document.bin, .idx and .json for each JSON key."""

    input: tuple[str, ...]
    """JSONL files, one JSON object a line, taken in this order."""
    output_prefix: str
    """Path and beginning of the output files' names."""
    tokenizer_type: Literal["SentencePieceTokenizer", "ByteTokenizer"]
    """Kind of tokenizer."""
    tokenizer_model: str | None = None
    """Model file of the tokenizer (SentencePieceTokenizer)."""
    json_keys: tuple[str, ...] = ("text",)
    """Keys of the JSON objects whose text is wanted."""
    append_eod: bool = False
    """End every document with the tokenizer's end-of-document token."""
    workers: int = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    """Processes that encode; 1 encodes in the main process. Default: one per core."""

    def prefix(self, key: str) -> str:
        """Prefix of the dataset made from a JSON key."""
        return f"{self.output_prefix}_{key}_document"


def find_problems(config: PreprocessConfig) -> list[str]:
    """Everything that is wrong with the arguments, a line each, with what would work. Empty: good to start."""
    problems = [] if config.input else ["--input: give at least one JSONL file"]
    for path in map(Path, config.input):
        if not path.exists():
            problems.append(f"--input {path}: no such file")
        elif not path.is_file():
            problems.append(f"--input {path}: not a file; name the JSONL files in it")
        elif not os.access(path, os.R_OK):
            problems.append(f"--input {path}: not readable")
    if config.workers < 1:
        problems.append(f"--workers {config.workers}: needs at least 1")
    if not config.json_keys or len(set(config.json_keys)) < len(config.json_keys):
        problems.append(f"--json-keys {' '.join(config.json_keys)}: needs at least one key, and each once")
    for key in dict.fromkeys(config.json_keys):
        folder = dataset_path(config.prefix(key), ".idx").parent
        if not folder.is_dir():
            problems.append(f"--output-prefix {config.output_prefix}: make the folder first: mkdir -p {folder}")
        elif not os.access(folder, os.W_OK):
            problems.append(f"--output-prefix {config.output_prefix}: the folder {folder} is not writable")
        problems += [
            f"--output-prefix {config.output_prefix}: {path} exists; delete it or choose another prefix"
            for path in (dataset_path(config.prefix(key), suffix) for suffix in (".bin", ".idx", ".json"))
            if path.exists()
        ]
    try:
        tokenizer = build_tokenizer(config.tokenizer_type, config.tokenizer_model)
        if config.append_eod:
            tokenizer.eod  # noqa: B018 - raises when there is none
    except TokenizerError as error:
        problems.append(str(error))
    return problems


class Progress(NamedTuple):
    """How far a run has come."""

    bytes_done: int
    bytes_total: int
    documents: int
    tokens: int
    seconds: float

    def __str__(self) -> str:
        megabytes = self.bytes_done / 1e6
        return (
            f"{megabytes:,.1f} of {self.bytes_total / 1e6:,.1f} MB, {self.documents:,} documents, "
            f"{self.tokens:,} tokens, {megabytes / max(self.seconds, 1e-9):,.1f} MB/s"
        )


def preprocess(
    config: PreprocessConfig, report: Callable[[Progress], None] = lambda progress: None
) -> list[DatasetInfo]:
    """Write the datasets of every key and return their descriptions; `report` is called after every block.

    Nothing has its final name before everything is written, so a run that is stopped leaves no dataset.
    Raises BadLineError at the first line that is no document, DatasetError when an output exists already.
    """
    tokenizer = build_tokenizer(config.tokenizer_type, config.tokenizer_model)
    dtype = np.dtype("<u2" if tokenizer.vocab_size < 65500 else "<i4")
    total = sum(Path(path).stat().st_size for path in config.input)
    started, done = time.perf_counter(), 0
    with ExitStack() as stack:
        writers = [stack.enter_context(IndexedWriter(config.prefix(key), dtype)) for key in config.json_keys]
        for encoded in stack.enter_context(_encoded_blocks(config, read_blocks(config.input), tokenizer)):
            for writer, (data, lengths) in zip(writers, encoded.per_key, strict=True):
                writer.add_documents(data, np.frombuffer(lengths, "<i4"))
            done += encoded.input_bytes
            tokens = sum(writer.tokens for writer in writers)
            report(Progress(done, total, writers[0].documents, tokens, time.perf_counter() - started))
        if not writers[0].documents:
            raise DatasetError(f"{', '.join(config.input)}: no documents; every input is empty")
        infos = [_describe(config, tokenizer, writer) for writer in writers]
        for writer, info in zip(writers, infos, strict=True):
            writer.finish(info)
    return infos


def _describe(config: PreprocessConfig, tokenizer: Tokenizer, writer: IndexedWriter) -> DatasetInfo:
    try:
        eod = tokenizer.eod
    except TokenizerError:
        eod = None
    size, digest = tokenizer.vocab_size, tokenizer.sha256
    return DatasetInfo(config.tokenizer_type, size, eod, digest, writer.documents, writer.tokens)


class Block(NamedTuple):
    """Whole lines of a file."""

    path: str
    first_line: int
    """Number of the first line, counted from 1."""
    data: bytes


class EncodedBlock(NamedTuple):
    """The documents of a block: for each JSON key the ids, ready to be written, and int32 lengths, both as bytes."""

    input_bytes: int
    per_key: list[tuple[bytes, bytes]]


def read_blocks(paths: Iterable[str]) -> Iterator[Block]:
    """The files in blocks of whole lines, about BLOCK_BYTES each."""
    for path in paths:
        line = 1
        with open(path, "rb") as file:
            while data := file.read(BLOCK_BYTES):
                if not data.endswith(b"\n"):
                    data += file.readline()
                yield Block(str(path), line, data)
                line += data.count(b"\n")


def parse_block(block: Block, keys: tuple[str, ...]) -> list[list[str]]:
    """The texts in the JSON lines of a block: for each key, one per line. Raises BadLineError."""
    texts = [[] for _ in keys]
    for number, line in enumerate(block.data.removesuffix(b"\n").split(b"\n"), block.first_line):
        try:
            document = json.loads(line.decode())
        except UnicodeDecodeError as error:
            raise _bad_line(
                block, number, f"not UTF-8: byte {line[error.start]:#04x} at column {error.start + 1}"
            ) from None
        except json.JSONDecodeError as error:
            reason = f"invalid JSON: {error.msg} at column {error.colno}" if line.strip() else "the line is empty"
            raise _bad_line(block, number, reason) from None
        except (ValueError, RecursionError) as error:
            raise _bad_line(block, number, f"JSON that cannot be read: {error}") from None
        if not isinstance(document, dict):
            raise _bad_line(block, number, f"a JSON object is needed, not {type(document).__name__}")
        for key, column in zip(keys, texts, strict=True):
            if not isinstance(text := document.get(key), str):
                found = f"{key!r} is {type(text).__name__}, not text" if key in document else f"no key {key!r}"
                raise _bad_line(block, number, f"{found}; keys here: {', '.join(document) or 'none'}")
            column.append(text)
    return texts


def _bad_line(block: Block, number: int, reason: str) -> BadLineError:
    return BadLineError(f"{block.path}, line {number}: {reason}")


def encode_block(block: Block, config: PreprocessConfig, tokenizer: Tokenizer) -> EncodedBlock:
    """Parse and encode one block. Raises BadLineError."""
    dtype = "<u2" if tokenizer.vocab_size < 65500 else "<i4"
    per_key = []
    for texts in parse_block(block, config.json_keys):
        try:
            ids, lengths = tokenizer.encode_batch(texts)
        except UnicodeEncodeError:
            number = next(i for i, text in enumerate(texts) if any("\ud800" <= c <= "\udfff" for c in text))
            raise _bad_line(block, block.first_line + number, "half of a surrogate pair, no Unicode text") from None
        lengths = (lengths + config.append_eod).astype("<i4")
        if config.append_eod:
            flat = np.full(int(lengths.sum(dtype=np.int64)), tokenizer.eod, dtype)
            inside = np.ones(len(flat), bool)
            inside[np.cumsum(lengths) - 1] = False
            flat[inside] = ids
        else:
            flat = ids.astype(dtype)
        per_key.append((flat.tobytes(), lengths.tobytes()))
    return EncodedBlock(len(block.data), per_key)


@contextmanager
def _encoded_blocks(config: PreprocessConfig, blocks: Iterator[Block], tokenizer: Tokenizer):
    """The encoded blocks, in the order of the blocks, made here or by worker processes."""
    if config.workers == 1:
        yield (encode_block(block, config, tokenizer) for block in blocks)
        return
    context = multiprocessing.get_context("spawn")
    connections: dict[Connection, multiprocessing.Process] = {}
    try:
        for _ in range(config.workers):
            ours, theirs = context.Pipe()
            connections[ours] = context.Process(target=_serve, args=(theirs, config), daemon=True)
            connections[ours].start()
            theirs.close()
        yield _in_order(connections, blocks)
    finally:
        for connection, process in connections.items():
            connection.close()
            process.terminate()
            process.join()


def _serve(connection: Connection, config: PreprocessConfig) -> None:
    """A worker: encode what comes until the other end is closed, which it is also when the main process is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    tokenizer = build_tokenizer(config.tokenizer_type, config.tokenizer_model)
    try:
        while True:
            number, block = connection.recv()
            try:
                connection.send((number, encode_block(block, config, tokenizer)))
            except BadLineError as error:
                connection.send((number, error))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def _in_order(workers: dict[Connection, multiprocessing.Process], blocks: Iterator[Block]) -> Iterator[EncodedBlock]:
    """Hand each idle worker the next block, and yield results in the order of the blocks.

    A worker has one block at a time, so neither end of a pipe waits for the other to read.
    """
    numbered = enumerate(blocks)
    idle, busy = list(workers), set()
    finished: dict[int, EncodedBlock | BadLineError] = {}
    written = taken = 0
    while True:
        while idle and taken < written + BLOCKS_AHEAD * len(workers) and (job := next(numbered, None)):
            connection = idle.pop()
            with _explaining_death(workers[connection]):
                connection.send(job)
            busy.add(connection)
            taken += 1
        if not busy:
            return
        for connection in wait(busy):
            with _explaining_death(workers[connection]):
                number, finished[number] = connection.recv()
            busy.remove(connection)
            idle.append(connection)
        while written in finished:
            result = finished.pop(written)
            if isinstance(result, BadLineError):
                raise result
            yield result
            written += 1


@contextmanager
def _explaining_death(worker: multiprocessing.Process):
    try:
        yield
    except (EOFError, OSError):
        worker.join(timeout=10)
        raise DatasetError(
            f"a worker process died (exit code {worker.exitcode}); its message, if any, is above. "
            "If memory ran out (exit code -9), use fewer --workers"
        ) from None


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
