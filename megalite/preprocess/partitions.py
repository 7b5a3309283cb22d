"""Several shards of one preprocessing at once on one machine, then merged."""

import multiprocessing
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from pathlib import Path

from megalite.data.indexed import DatasetError, DatasetInfo, dataset_path
from megalite.preprocess.config import PreprocessConfig
from megalite.preprocess.inputs import shard_ranges
from megalite.preprocess.journal import JOURNAL, Journal
from megalite.preprocess.merge import merge_into
from megalite.preprocess.progress import Progress
from megalite.preprocess.shard import job_of, known_bytes, make_shard, refuse_existing, too_many
from megalite.preprocess.workers import sigint_blocked


def make_in_partitions(
    config: PreprocessConfig, files: list[str], report: Callable[[Progress], None]
) -> None:
    """What `make_shard` does for all of the files, by --partitions processes with outputs of their own.

    Finished parts are kept when it is interrupted, and unfinished ones go on. Raises what `preprocess` raises.
    """
    with Journal(config.folder, job_of(config, files)) as journal:
        if journal.state is None:
            refuse_existing(config)
            journal.commit({"renames": []})
        try:
            if not journal.state["renames"]:
                journal.commit({"renames": _make_all(config, files, report)})
            journal.end(journal.state["renames"])
        except BaseException:
            if not [*config.folder.glob("*.idx"), *config.folder.glob(f"*/{JOURNAL}")]:
                shutil.rmtree(
                    config.folder, ignore_errors=True
                )  # no part has anything to go on from
            raise


def _make_all(
    config: PreprocessConfig, files: list[str], report: Callable[[Progress], None]
) -> list[tuple[str, str]]:
    """Make the parts, and the whole of them in the folder. Returns the renames that are left to do."""
    began = time.perf_counter()
    parts = [_part(config, number) for number in range(config.partitions)]
    finished = [_finished(part, files) for part in parts if _is_finished(part)]
    done = _run(
        [part for part in parts if not _is_finished(part)],
        files,
        finished,
        config.max_bad_lines,
        report,
    )
    whole = Progress.total([_finished(part, files) for part in parts])
    whole.bytes_now, whole.tokens_now, whole.spent = done.bytes_now, done.tokens_now, done.spent
    if whole.bad_lines > config.max_bad_lines:
        raise too_many(whole.last_bad_line, whole.bad_lines, config.max_bad_lines)
    if not whole.documents:
        shutil.rmtree(config.folder)
        raise DatasetError(f"{', '.join(config.input)}: no documents")
    renames, lines = [], b"".join(map(_bad_lines, parts))
    if lines:
        renames.append((config.folder / "bad_lines.tsv", config.bad_lines))
        renames[0][0].write_bytes(lines)
    for key in config.json_keys:
        renames += merge_into(
            config.folder, [part.prefix(key) for part in parts], config.prefix(key)
        )
    whole.seconds = time.perf_counter() - began
    report(whole)
    return [(str(source), str(final)) for source, final in renames]


def _part(config: PreprocessConfig, number: int) -> PreprocessConfig:
    shard = f"{number}/{config.partitions}"
    workers = max(1, config.workers // config.partitions)
    return replace(
        config,
        output_prefix=str(config.folder / "part"),
        shard=shard,
        partitions=1,
        workers=workers,
    )


def _is_finished(part: PreprocessConfig) -> bool:
    return all(dataset_path(part.prefix(key), ".idx").exists() for key in part.json_keys)


def _bad_lines(part: PreprocessConfig) -> bytes:
    return Path(part.bad_lines).read_bytes() if Path(part.bad_lines).exists() else b""


def _finished(part: PreprocessConfig, files: list[str]) -> Progress:
    """How far a part came that an earlier run finished."""
    infos = [DatasetInfo.read(part.prefix(key)) for key in part.json_keys]
    size = known_bytes(files, shard_ranges(files, *part.place))
    rows = _bad_lines(part).decode().splitlines()
    last = rows[-1].replace("\t", ", line ", 1).replace("\t", ": ", 1) if rows else ""
    tokens = sum(info.tokens for info in infos)
    return Progress(size, size, infos[0].documents, tokens, bad_lines=len(rows), last_bad_line=last)


def _run(
    parts: list[PreprocessConfig],
    files: list[str],
    finished: list[Progress],
    max_bad_lines: int,
    report: Callable[[Progress], None],
) -> Progress:
    """Run the parts, each in a process, beside those that are finished. Returns what all have done.

    Raises the first error of any, and BadLineError when all together have too many bad lines.
    """
    context = multiprocessing.get_context("spawn")
    running: dict[Connection, multiprocessing.Process] = {}
    progress: dict[Connection, Progress] = {}
    total = Progress.total(finished) if finished else Progress(0)
    try:
        for part in parts:
            ours, theirs = context.Pipe(duplex=False)
            running[ours] = context.Process(target=_make, args=(part, files, theirs))
            with sigint_blocked():
                running[ours].start()
            theirs.close()
        waiting = set(running)
        while waiting:
            for connection in wait(waiting):
                try:
                    told = connection.recv()
                except EOFError:
                    running[connection].join()
                    if running[connection].exitcode:
                        raise DatasetError(
                            f"a part ended with status {running[connection].exitcode}"
                        ) from None
                    waiting.remove(connection)
                    continue
                if isinstance(told, Exception):
                    raise told
                progress[connection] = told
                total = Progress.total(
                    [told, *(p for c, p in progress.items() if c is not connection), *finished]
                )
                if total.bad_lines > max_bad_lines:
                    raise too_many(total.last_bad_line, total.bad_lines, max_bad_lines)
            if len(progress) == len(parts):
                report(total)
        return total
    finally:
        for connection, process in running.items():
            connection.close()
            process.terminate()
            process.join()


def _make(part: PreprocessConfig, files: list[str], connection: Connection) -> None:
    """One part, in a process of its own; it ends when nobody listens any more."""
    try:
        make_shard(part, files, connection.send)
    except BrokenPipeError:
        return
    except (DatasetError, OSError, ValueError) as error:
        connection.send(error)
