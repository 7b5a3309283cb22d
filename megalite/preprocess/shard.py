"""Make one shard of a preprocessing, or all of it: processes encode blocks, this one writes them in order."""

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from megalite.data.indexed import DatasetError, DatasetInfo
from megalite.data.tokenizers import TokenizerError
from megalite.preprocess.config import PreprocessConfig, sentence_splitter
from megalite.preprocess.encode import EncodedBlock, Encoder
from megalite.preprocess.indexed_writer import IndexedWriter
from megalite.preprocess.inputs import (
    STDIN,
    Block,
    count_lines,
    kind_of,
    read_blocks,
    shard_ranges,
    shown,
    sizes_of,
)
from megalite.preprocess.journal import FolderError, Journal
from megalite.preprocess.progress import Progress
from megalite.preprocess.workers import encoded_blocks

COMMIT_SECONDS, COMMIT_TOKENS = 5.0, 1 << 25
"""How often an output is put on the disk, to go on from there."""
SHOWN_BAD_LINES = 10


class BadLineError(DatasetError):
    """A line of the input that is no document: names the file, the line and the reason."""


def too_many(line: str, number: int, most: int) -> BadLineError:
    """What is said of bad line `number`, one more than the `most` that are left out."""
    more = f" This is bad line {number}." if most else ""
    return BadLineError(
        f"{line}.{more} --max-bad-lines N leaves out up to N such lines (now {most})"
    )


def build_encoder(config: PreprocessConfig) -> Encoder:
    """What encodes blocks under this configuration. Raises TokenizerError, DatasetError."""
    split = sentence_splitter(config.language) if config.split_sentences else None
    return Encoder(config.tokenizer, config.json_keys, config.append_eod, split)


def make_shard(
    config: PreprocessConfig, files: list[str], report: Callable[[Progress], None]
) -> None:
    """Write the datasets of every key: of all of the files, or of the shard of --shard.

    Nothing has its final name before everything is written. What an interrupted run of the same job wrote is kept.
    After an error, the folder is there if the same call would go on from it. Raises what `preprocess` raises.
    """
    with Journal(config.folder, job_of(config, files), resumable=STDIN not in files) as journal:
        if journal.state is None:
            refuse_existing(config)
        if journal.state is None or not journal.state.get("renames"):
            with ExitStack() as stack:
                _Run(config, files, journal, stack).to_the_end(report)
        journal.end(journal.state["renames"])


def refuse_existing(config: PreprocessConfig) -> None:
    """Raises DatasetError when a file is there already that the job would write."""
    if existing := config.existing_outputs():
        raise DatasetError(
            f"{', '.join(existing)} exists already. Delete it or choose another --output-prefix"
        )


def job_of(config: PreprocessConfig, files: list[str]) -> dict:
    """What decides the bytes of the output, to tell whether an interrupted run was this one."""
    stats = [os.stat(path) for path in files if path != STDIN]
    job = {
        "input": [[path, stat.st_size, stat.st_mtime_ns] for path, stat in zip(files, stats)]
        if stats
        else list(files),
        "tokenizer": [config.tokenizer_type, config.tokenizer.vocab_size, config.tokenizer.sha256],
        "json keys": list(config.json_keys),
        "append eod": config.append_eod,
        "sentences": config.language if config.split_sentences else None,
        "shard": config.shard,
        "partitions": config.partitions,
    }
    if config.parse_special_tokens:  # journals of before do not have it
        job["parse special tokens"] = True
    return job


def known_bytes(files: list[str], ranges: list[tuple[int, int, int]]) -> int:
    """Bytes of these ranges; 0 where they are not known before they are read, as of compressed files."""
    if any(kind_of(files[number]) not in ("plain", "text") for number, _, _ in ranges):
        return 0
    sizes = sizes_of(files)
    return sum(min(stop, sizes[number]) - start for number, start, stop in ranges)


class _Run:
    """The making of one output, from its beginning or from what the journal says."""

    def __init__(
        self, config: PreprocessConfig, files: list[str], journal: Journal, stack: ExitStack
    ):
        self.config, self.files, self.journal, self.stack = config, files, journal, stack
        state = journal.state or {
            "after": [0, 0],
            "line": 1,
            "bad": 0,
            "bad_bytes": 0,
            "writers": [None] * len(config.json_keys),
        }
        dtype = np.dtype("<u2" if config.tokenizer.vocab_size < 65500 else "<i4")
        self.writers = [
            stack.enter_context(IndexedWriter(config.prefix(key), dtype, journal.folder, kept))
            for key, kept in zip(config.json_keys, state["writers"], strict=True)
        ]
        self.after, self.line, self.bad = tuple(state["after"]), state["line"], state["bad"]
        self.bad_file = stack.enter_context(
            open(journal.folder / "bad_lines.tsv", "a+b" if journal.state else "w+b")
        )
        if self.bad_file.seek(0, os.SEEK_END) < state["bad_bytes"]:
            raise FolderError(
                f"{self.bad_file.name} is damaged: delete {journal.folder} to start anew"
            )
        self.bad_file.truncate(state["bad_bytes"])
        self.bad_file.seek(state["bad_bytes"])
        self.ranges = shard_ranges(files, *config.place)
        done = self._bytes_before(self.after, sizes_of(files))
        self.progress = Progress(
            known_bytes(files, self.ranges), bytes_done=done, bad_lines=self.bad
        )
        self._committed = time.monotonic(), 0
        self._before: dict[int, int] = {}

    def _bytes_before(self, after: tuple[int, int], sizes: list[int]) -> int:
        return sum(
            min(stop, sizes[number]) - start
            if number < after[0]
            else max(0, min(after[1], sizes[number]) - start)
            for number, start, stop in self.ranges
            if number <= after[0]
        )

    def to_the_end(self, report: Callable[[Progress], None]) -> None:
        """Encode and write what is left, and leave complete files and their renames to the journal."""
        began, progress = time.perf_counter(), self.progress
        blocks = read_blocks(self.files, self.ranges, self.config.json_keys, self.after)
        encoded = self.stack.enter_context(
            encoded_blocks(self.config.workers, build_encoder, self.config, blocks)
        )
        for block, result in encoded:
            self._write(block, result)
            progress.seconds = time.perf_counter() - began
            report(progress)
        if not self.writers[0].documents and not self.config.shard:
            raise DatasetError(f"{', '.join(map(shown, self.config.input))}: no documents")
        self._commit()
        renames = (
            [(self.journal.folder / "bad_lines.tsv", self.config.bad_lines)] if self.bad else []
        )
        renames += [
            rename for writer in self.writers for rename in writer.seal(self._describe(writer))
        ]
        self.journal.commit({"renames": [[str(source), str(final)] for source, final in renames]})
        progress.seconds = time.perf_counter() - began
        report(progress)

    def _write(self, block: Block, result: EncodedBlock) -> None:
        began, progress = time.perf_counter(), self.progress
        self._note_bad_lines(block, result)
        before = sum(writer.tokens for writer in self.writers)
        for writer, lines in zip(self.writers, result.per_key, strict=True):
            writer.add_documents(*lines)
        last_of_file = self.after[0] != block.file
        self.line = (1 if last_of_file else self.line) + result.lines
        self.after = block.file, block.stop
        tokens = sum(writer.tokens for writer in self.writers)
        progress.bytes_done += block.stop - block.start
        progress.bytes_now += block.stop - block.start
        progress.documents, progress.tokens = self.writers[0].documents, tokens
        progress.tokens_now += tokens - before
        when, written = self._committed
        if (
            time.monotonic() - when > COMMIT_SECONDS
            or progress.tokens_now - written > COMMIT_TOKENS
        ):
            self._commit()
        for name, seconds in zip(("read", "parse", "encode"), result.seconds):
            progress.spent[name] += seconds
        progress.spent["write"] += time.perf_counter() - began

    def _note_bad_lines(self, block: Block, result: EncodedBlock) -> None:
        if not result.bad:
            return
        first = self._lines_before(block.file) + (1 if self.after[0] != block.file else self.line)
        for offset, reason in result.bad:
            reason = " ".join(reason.splitlines())  # it may quote keys with line ends in them
            text = f"{block.path}, line {first + offset}: {reason}"
            self.bad += 1
            if self.bad > self.config.max_bad_lines:
                raise too_many(text, self.bad, self.config.max_bad_lines)
            self.bad_file.write(
                f"{block.path}\t{first + offset}\t{reason}\n".encode(errors="replace")
            )
            if self.bad <= SHOWN_BAD_LINES:
                print(f"left out: {text}", file=sys.stderr)
            self.progress.bad_lines, self.progress.last_bad_line = self.bad, text

    def _lines_before(self, file: int) -> int:
        """Lines of a file that belong to the shards before this one; counted when a line is to be named."""
        if file not in self._before:
            start = next(start for number, start, _ in self.ranges if number == file)
            self._before[file] = count_lines(self.files[file], start) if start else 0
        return self._before[file]

    def _commit(self) -> None:
        self.bad_file.flush()
        os.fsync(self.bad_file.fileno())
        writers = [writer.state() for writer in self.writers]
        state = {
            "after": self.after,
            "line": self.line,
            "bad": self.bad,
            "bad_bytes": self.bad_file.tell(),
        }
        self.journal.commit({**state, "writers": writers})
        self._committed = time.monotonic(), self.progress.tokens_now

    def _describe(self, writer: IndexedWriter) -> DatasetInfo:
        tokenizer = self.config.tokenizer
        try:
            eod = tokenizer.eod
        except TokenizerError:
            eod = None
        return DatasetInfo(
            self.config.tokenizer_type,
            tokenizer.vocab_size,
            eod,
            tokenizer.sha256,
            writer.documents,
            writer.tokens,
            self.config.split_sentences,
            self.config.append_eod,
            _digest(self.files) if self.config.shard else None,
            self.config.parse_special_tokens,
        )


def _digest(files: list[str]) -> str:
    """Of names and sizes; no folders and times, since each machine of an array job may have copies of its own."""
    inputs = [(Path(path).name, size) for path, size in zip(files, sizes_of(files))]
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()
