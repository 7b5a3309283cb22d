"""Writes the datasets of one shard, or of all files when the run has no --shard: workers encode
blocks, this process writes them in order."""

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

from megalite.data.indexed import DatasetError, DatasetInfo
from megalite.preprocess import inputs
from megalite.preprocess.config import PreprocessConfig
from megalite.preprocess.encode import EncodedBlock, stored_dtype
from megalite.preprocess.indexed_writer import IndexedWriter, refuse_existing, truncate
from megalite.preprocess.inputs import STDIN, Block
from megalite.preprocess.journal import Journal, open_named, sync_file
from megalite.preprocess.progress import PreprocessProgress
from megalite.preprocess.workers import encoded_blocks

COMMIT_SECONDS = 5.0
COMMIT_TOKENS = 1 << 25
"""After this time or this many tokens, output is flushed to the disk, to resume from there."""
SHOWN_BAD_LINES = 10
BAD_LINES = "bad_lines.tsv"
"""The list of bad lines in the staging directory."""


class BadLineError(DatasetError):
    """A line of the input that is not a document: names the file, the line and the reason."""


def too_many_bad_lines(line: str, number: int, config: PreprocessConfig) -> BadLineError:
    """The error about bad line `number`, the first beyond those that may be left out."""
    limit = config.max_bad_lines
    more = f" This is bad line {number}." if limit else ""
    return BadLineError(
        f"{line}.{more} --max-bad-lines N leaves out up to N such lines (now {limit})"
    )


@contextmanager
def open_journal(config: PreprocessConfig, files: list[str]):
    """The journal of a job, to use in a `with` block.

    Raises StagingError as Journal does, and DatasetError when an output of a new job exists.
    """
    job = _job_description(config, files)
    with Journal(config.staging_dir, job, resumable=STDIN not in files) as journal:
        if journal.state is None:
            refuse_existing(config.existing_outputs())
        yield journal


def write_shard(
    config: PreprocessConfig, files: list[str], journal: Journal, report: Callable
) -> None:
    """Write the datasets of every key, of all files or of the shard that --shard names.

    What an interrupted run wrote is kept. The complete files are left in the journal's staging
    directory, and the journal knows their renames. `report` is called with the progress after every
    block, and at the end.

    Raises:
        BadLineError: at a bad line, one more than may be left out.
        DatasetError: an input cannot be read.
        TokenizerError: the fast tokenizer backend gives wrong ids.
    """
    with ExitStack() as stack:
        _ShardRun(config, files, journal, stack).write_rest(report)


def _job_description(config: PreprocessConfig, files: list[str]) -> dict:
    """Everything that decides the bytes of the output.

    An interrupted run is resumed if its description is the same. Lines that are left out
    (--max-bad-lines, --skip-empty) are not in it: a run that such a line stopped may resume with
    the flag.
    """
    known: list = []
    for path in files:
        if path == STDIN:
            known.append(path)
        else:
            stat = os.stat(path)
            known.append([path, stat.st_size, stat.st_mtime_ns])
    tokenizer = config.tokenizer
    job = {
        "input": known,
        "tokenizer": [config.tokenizer_type, tokenizer.vocab_size, tokenizer.sha256],
        "json keys": list(config.json_keys),
        "append eod": config.append_eod,
        "sentences": config.language if config.split_sentences else None,
        "shard": config.shard,
        "partitions": config.partitions,
    }
    if config.parse_special_tokens:  # older journals lack the key
        job["parse special tokens"] = True
    return job


class _ShardRun:
    """Writes one output, from its beginning or from where the journal says."""

    def __init__(
        self, config: PreprocessConfig, files: list[str], journal: Journal, stack: ExitStack
    ):
        self.config = config
        self.files = files
        self.journal = journal
        self.stack = stack
        start = {"after": [0, 0], "line": 1, "bad": 0, "bad_bytes": 0, "empty": 0}
        state = start | {"writers": [None] * len(config.json_keys)} | (journal.state or {})
        # Position: the file and the offset where the last written block ended, and the number of
        # the next line of that file, counted from the start of the shard.
        self.position: tuple[int, int] = tuple(state["after"])
        self.line: int = state["line"]
        self._open_outputs(state)
        # Count what is done.
        self.ranges = inputs.shard_ranges(files, *config.shard_position)
        self.progress = PreprocessProgress(bad_lines=state["bad"], empty=state["empty"])
        self._count_bytes()
        self._count_documents()
        self._committed_at = time.monotonic()
        self._committed_tokens = 0
        self._lines_skipped: dict[int, int] = {}

    def _open_outputs(self, state: dict) -> None:
        """Open the datasets and the list of bad lines, truncated to the journal's state."""
        dtype = stored_dtype(self.config.tokenizer.vocab_size)
        folder = self.journal.staging_dir
        self.writers = []
        for key, writer_state in zip(self.config.json_keys, state["writers"], strict=True):
            writer = IndexedWriter(self.config.prefix(key), dtype, folder, writer_state)
            self.writers.append(self.stack.enter_context(writer))
        mode = "w+" if self.journal.state is None else "a+"
        self.bad_file = self.stack.enter_context(open_named(folder / BAD_LINES, mode))
        truncate(self.bad_file, state["bad_bytes"])

    def _count_bytes(self) -> None:
        """Count the bytes of the shard, and those before the position.

        A compressed file counts with its size before the position; the total is then unknown.
        """
        sizes = inputs.sizes_of(self.files)
        for number, start, stop in self.ranges:
            size = min(stop, sizes[number]) - start
            self.progress.bytes_total += size
            if number < self.position[0]:
                self.progress.bytes_done += size
            elif number == self.position[0]:
                self.progress.bytes_done += min(max(0, self.position[1] - start), size)
        kinds = {inputs.kind_of(self.files[number]) for number, _, _ in self.ranges}
        if not kinds <= {"plain", "text"}:
            self.progress.bytes_total = 0

    def _count_documents(self) -> None:
        self.progress.documents = self.writers[0].documents
        self.progress.tokens = sum(writer.tokens for writer in self.writers)

    def write_rest(self, report: Callable[[PreprocessProgress], None]) -> None:
        """Encode and write what is left, complete the files, and commit their renames."""
        start = time.perf_counter()
        config = self.config
        progress = self.progress
        # Write every block.
        blocks = inputs.read_blocks(self.files, self.ranges, config.json_keys, self.position)
        for block, result in self.stack.enter_context(encoded_blocks(config, blocks)):
            self._write(block, result)
            progress.seconds = time.perf_counter() - start
            report(progress)
        # A shard may be empty, but not the whole.
        if not self.writers[0].documents and not config.shard:
            names = ", ".join(map(inputs.display_name, config.input))
            raise DatasetError(f"{names}: no documents")
        # Complete the files. The .idx of the last key gets its name last.
        self._commit()
        renames = []
        if progress.bad_lines:
            renames.append((str(self.journal.staging_dir / BAD_LINES), config.bad_lines))
        for writer in self.writers:
            renames += writer.seal(self._describe(writer))
        progress.seconds = time.perf_counter() - start
        self.journal.commit({"renames": renames, "progress": asdict(progress)})
        report(progress)

    def _write(self, block: Block, result: EncodedBlock) -> None:
        """Append a block to the datasets, and commit from time to time."""
        start = time.perf_counter()
        progress = self.progress
        self._note_bad_lines(block, result)
        # Append the documents.
        tokens_before = progress.tokens
        for writer, documents in zip(self.writers, result.per_key, strict=True):
            writer.add_documents(*documents)
        # Move the position.
        if self.position[0] != block.file:
            self.line = 1
        self.line += result.lines
        self.position = (block.file, block.stop)
        # Count.
        progress.bytes_done += block.stop - block.start
        progress.bytes_now += block.stop - block.start
        self._count_documents()
        progress.tokens_now += progress.tokens - tokens_before
        progress.empty += result.empty
        for name, seconds in zip(("read", "parse", "encode"), result.seconds):
            progress.spent[name] += seconds
        overdue = time.monotonic() - self._committed_at > COMMIT_SECONDS
        if overdue or progress.tokens_now - self._committed_tokens > COMMIT_TOKENS:
            self._commit()
        progress.spent["write"] += time.perf_counter() - start

    def _note_bad_lines(self, block: Block, result: EncodedBlock) -> None:
        """List the bad lines of a block. Raises BadLineError when they are too many."""
        if not result.bad:
            return
        progress = self.progress
        first = self._lines_before(block.file)
        first += self.line if self.position[0] == block.file else 1
        for bad in result.bad:
            number = first + bad.number
            reason = " ".join(bad.reason.splitlines())  # it may quote keys with line ends in them
            text = f"{block.path}, line {number}: {reason}"
            progress.bad_lines += 1
            progress.last_bad_line = text
            if progress.bad_lines > self.config.max_bad_lines:
                raise too_many_bad_lines(text, progress.bad_lines, self.config)
            self.bad_file.write(f"{block.path}\t{number}\t{reason}\n".encode(errors="replace"))
            if progress.bad_lines <= SHOWN_BAD_LINES:
                print(f"left out: {text}", file=sys.stderr)

    def _lines_before(self, file: int) -> int:
        """Lines of a file that belong to earlier shards, counted when a line is to be named."""
        if file not in self._lines_skipped:
            start = next(start for number, start, _ in self.ranges if number == file)
            self._lines_skipped[file] = inputs.count_lines(self.files[file], start) if start else 0
        return self._lines_skipped[file]

    def _commit(self) -> None:
        """Flush everything to the disk, then write to the journal how far it is good."""
        sync_file(self.bad_file)
        state = {
            "after": self.position,
            "line": self.line,
            "bad": self.progress.bad_lines,
            "bad_bytes": self.bad_file.tell(),
            "empty": self.progress.empty,
            "writers": [writer.sync() for writer in self.writers],
        }
        self.journal.commit(state)
        self._committed_at = time.monotonic()
        self._committed_tokens = self.progress.tokens_now

    def _describe(self, writer: IndexedWriter) -> DatasetInfo:
        """The description of a dataset, for its .json."""
        config = self.config
        tokenizer = config.tokenizer
        return DatasetInfo(
            tokenizer_type=config.tokenizer_type,
            vocab_size=tokenizer.vocab_size,
            eod=tokenizer.eod_or_none,
            tokenizer_sha256=tokenizer.sha256,
            documents=writer.documents,
            tokens=writer.tokens,
            sentences=config.split_sentences,
            append_eod=config.append_eod,
            inputs=_inputs_digest(self.files) if config.shard else None,
            parse_special_tokens=config.parse_special_tokens,
        )


def _inputs_digest(files: list[str]) -> str:
    """A digest of the names and sizes of all inputs, by which shards of the same inputs are known.

    Folders and times are not in it: each machine of an array job may have copies of its own.
    """
    known = [(Path(path).name, size) for path, size in zip(files, inputs.sizes_of(files))]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()
