"""One output of preprocessing: workers encode blocks, this process writes them in order."""

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from megalite.data.indexed import DatasetError, DatasetInfo
from megalite.data.tokenizers import TokenizerError
from megalite.preprocess.config import PreprocessConfig, sentence_splitter
from megalite.preprocess.encode import EncodedBlock, Encoder, stored_dtype
from megalite.preprocess.indexed_writer import IndexedWriter
from megalite.preprocess.inputs import (
    STDIN,
    Block,
    count_lines,
    display_name,
    kind_of,
    read_blocks,
    shard_ranges,
    sizes_of,
)
from megalite.preprocess.journal import Journal, StagingError, open_named, sync_file
from megalite.preprocess.progress import Progress
from megalite.preprocess.workers import encoded_blocks

COMMIT_SECONDS = 5.0
COMMIT_TOKENS = 1 << 25
"""After this time or this many tokens, output is flushed to the disk, to resume from there."""
SHOWN_BAD_LINES = 10


class BadLineError(DatasetError):
    """A line of the input that is not a document: names the file, the line and the reason."""


def too_many_bad_lines(line: str, number: int, limit: int) -> BadLineError:
    """The error about bad line `number`, the first beyond the `limit` that may be left out."""
    more = f" This is bad line {number}." if limit else ""
    return BadLineError(
        f"{line}.{more} --max-bad-lines N leaves out up to N such lines (now {limit})"
    )


def build_encoder(config: PreprocessConfig) -> Encoder:
    """The encoder of blocks under this configuration. Raises TokenizerError, DatasetError."""
    split = sentence_splitter(config.language) if config.split_sentences else None
    return Encoder(
        config.tokenizer,
        config.json_keys,
        append_eod=config.append_eod,
        split=split,
        skip_empty=config.skip_empty,
    )


def make_shard(
    config: PreprocessConfig, files: list[str], report: Callable[[Progress], None]
) -> None:
    """Write the datasets of every key, of all files or of the shard that --shard names.

    Files get their final names when all are complete. What an interrupted run of the same job
    wrote is kept. After an error, the staging directory remains if the same call would resume from
    it. `report` is called after every block, and once more before the files get their final names.

    Raises:
        BadLineError: at a bad line, one more than may be left out.
        DatasetError: an output exists, an input cannot be read, or another job's staging
            directory is in the way.
        TokenizerError: the fast tokenizer backend gives wrong ids.
    """
    job = job_description(config, files)
    with Journal(config.staging_dir, job, resumable=STDIN not in files) as journal:
        if journal.state is None:
            refuse_existing(config)
        if journal.state is None or not journal.state.get("renames"):
            with ExitStack() as stack:
                progress = _ShardRun(config, files, journal, stack).write_rest(report)
        else:
            progress = Progress.of_earlier_run(journal.state.get("progress", {}))
        report(progress)
        journal.publish(journal.state["renames"])


def refuse_existing(config: PreprocessConfig) -> None:
    """Raises DatasetError when a file exists already that the job would write."""
    if existing := config.existing_outputs():
        raise DatasetError(
            f"{', '.join(existing)} exists already. Delete it or choose another --output-prefix"
        )


def job_description(config: PreprocessConfig, files: list[str]) -> dict:
    """Everything that decides the bytes of the output.

    An interrupted run is resumed if its description is the same. Lines that are left out
    (--max-bad-lines, --skip-empty) are not in it: a run that such a line stopped may resume with
    the flag.
    """
    inputs: list = []
    for path in files:
        if path == STDIN:
            inputs.append(path)
        else:
            stat = os.stat(path)
            inputs.append([path, stat.st_size, stat.st_mtime_ns])
    tokenizer = config.tokenizer
    job = {
        "input": inputs,
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
        start["writers"] = [None] * len(config.json_keys)
        state = {**start, **(journal.state or {})}
        # Position: the file and the offset where the last written block ended, and the number of
        # the next line of that file, counted from the start of the shard.
        self.position: tuple[int, int] = tuple(state["after"])
        self.line: int = state["line"]
        self.bad: int = state["bad"]
        # Open the datasets and the list of bad lines, and truncate them to the journal's state.
        dtype = stored_dtype(config.tokenizer.vocab_size)
        self.writers = []
        for key, writer_state in zip(config.json_keys, state["writers"], strict=True):
            writer = IndexedWriter(config.prefix(key), dtype, journal.staging_dir, writer_state)
            self.writers.append(stack.enter_context(writer))
        bad_path = journal.staging_dir / "bad_lines.tsv"
        mode = "w+" if journal.state is None else "a+"
        self.bad_file = stack.enter_context(open_named(bad_path, mode))
        if self.bad_file.seek(0, os.SEEK_END) < state["bad_bytes"]:
            raise StagingError(
                f"{bad_path} is damaged: delete {journal.staging_dir} to start again"
            )
        self.bad_file.truncate(state["bad_bytes"])
        self.bad_file.seek(state["bad_bytes"])
        # Count what is done.
        self.ranges = shard_ranges(files, *config.shard_position)
        self.progress = Progress(
            self._total_bytes(),
            bytes_done=self._bytes_before(self.position),
            bad_lines=self.bad,
            empty=state["empty"],
        )
        self._committed_at = time.monotonic()
        self._committed_tokens = 0
        self._lines_skipped: dict[int, int] = {}

    def _total_bytes(self) -> int:
        """Bytes of the shard; 0: not known before they are read, as of compressed files."""
        sizes = sizes_of(self.files)
        total = 0
        for number, start, stop in self.ranges:
            if kind_of(self.files[number]) not in ("plain", "text"):
                return 0
            total += min(stop, sizes[number]) - start
        return total

    def _bytes_before(self, position: tuple[int, int]) -> int:
        """Bytes of the shard before a position; a compressed file counts with its size."""
        sizes = sizes_of(self.files)
        total = 0
        for number, start, stop in self.ranges:
            if number < position[0]:
                total += min(stop, sizes[number]) - start
            elif number == position[0]:
                total += max(0, min(position[1], sizes[number]) - start)
        return total

    def write_rest(self, report: Callable[[Progress], None]) -> Progress:
        """Encode and write what is left, complete the files, and commit their renames."""
        start = time.perf_counter()
        config = self.config
        progress = self.progress
        # Write every block.
        blocks = read_blocks(self.files, self.ranges, config.json_keys, self.position)
        encoded = encoded_blocks(config.workers, build_encoder, config, blocks)
        for block, result in self.stack.enter_context(encoded):
            self._write(block, result)
            progress.seconds = time.perf_counter() - start
            report(progress)
        # A shard may be empty, but not the whole.
        if not self.writers[0].documents and not config.shard:
            raise DatasetError(f"{', '.join(map(display_name, config.input))}: no documents")
        # Complete the files. The .idx of the last key gets its name last.
        self._commit()
        renames = []
        if self.bad:
            renames.append((str(self.journal.staging_dir / "bad_lines.tsv"), config.bad_lines))
        for writer in self.writers:
            for source, final in writer.seal(self._describe(writer)):
                renames.append((str(source), str(final)))
        progress.seconds = time.perf_counter() - start
        progress.finished = True
        self.journal.commit({"renames": renames, "progress": asdict(progress)})
        return progress

    def _write(self, block: Block, result: EncodedBlock) -> None:
        """Append a block to the datasets, and commit from time to time."""
        start = time.perf_counter()
        progress = self.progress
        self._note_bad_lines(block, result)
        # Append the documents.
        tokens_before = sum(writer.tokens for writer in self.writers)
        for writer, documents in zip(self.writers, result.per_key, strict=True):
            writer.add_documents(*documents)
        tokens = sum(writer.tokens for writer in self.writers)
        # Move the position.
        if self.position[0] != block.file:
            self.line = 1
        self.line += result.lines
        self.position = (block.file, block.stop)
        # Count.
        progress.bytes_done += block.stop - block.start
        progress.bytes_now += block.stop - block.start
        progress.documents = self.writers[0].documents
        progress.tokens = tokens
        progress.tokens_now += tokens - tokens_before
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
        limit = self.config.max_bad_lines
        first = self._lines_before(block.file)
        first += self.line if self.position[0] == block.file else 1
        for bad in result.bad:
            number = first + bad.number
            reason = " ".join(bad.reason.splitlines())  # it may quote keys with line ends in them
            text = f"{block.path}, line {number}: {reason}"
            self.bad += 1
            if self.bad > limit:
                raise too_many_bad_lines(text, self.bad, limit)
            self.bad_file.write(f"{block.path}\t{number}\t{reason}\n".encode(errors="replace"))
            if self.bad <= SHOWN_BAD_LINES:
                print(f"left out: {text}", file=sys.stderr)
            self.progress.bad_lines = self.bad
            self.progress.last_bad_line = text

    def _lines_before(self, file: int) -> int:
        """Lines of a file that belong to earlier shards, counted when a line is to be named."""
        if file not in self._lines_skipped:
            start = next(start for number, start, _ in self.ranges if number == file)
            self._lines_skipped[file] = count_lines(self.files[file], start) if start else 0
        return self._lines_skipped[file]

    def _commit(self) -> None:
        """Flush everything to the disk, then write to the journal how far it is good."""
        sync_file(self.bad_file)
        state = {
            "after": self.position,
            "line": self.line,
            "bad": self.bad,
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
        try:
            eod = tokenizer.eod
        except TokenizerError:
            eod = None
        return DatasetInfo(
            tokenizer_type=config.tokenizer_type,
            vocab_size=tokenizer.vocab_size,
            eod=eod,
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
    inputs = []
    for path, size in zip(files, sizes_of(files)):
        inputs.append((Path(path).name, size))
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()
