"""All shards of a preprocessing at the same time on one machine (--partitions), then merged."""

import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path

from megalite.data.indexed import DatasetError, dataset_path
from megalite.preprocess.config import PreprocessConfig
from megalite.preprocess.journal import JOURNAL, Journal, StagingError, write_json
from megalite.preprocess.merge import merge_into
from megalite.preprocess.progress import Progress
from megalite.preprocess.shard import (
    job_description,
    make_shard,
    refuse_existing,
    too_many_bad_lines,
)
from megalite.preprocess.workers import sigint_blocked


def make_in_partitions(
    config: PreprocessConfig, files: list[str], report: Callable[[Progress], None]
) -> None:
    """Make what `make_shard` makes of all files, by --partitions processes, one for each shard.

    Shards are made in the staging directory, and merged there. After an interruption, finished
    shards are kept, and unfinished ones resume. Raises what `make_shard` raises.
    """
    staging_dir = config.staging_dir
    with Journal(staging_dir, job_description(config, files)) as journal:
        if journal.state is None:
            refuse_existing(config)
            journal.commit({"renames": []})
        try:
            if journal.state["renames"]:
                report(Progress.of_earlier_run(journal.state.get("progress", {})))
            else:
                progress, renames = _make_and_merge(config, files, report)
                journal.commit({"renames": renames, "progress": asdict(progress)})
            journal.publish(journal.state["renames"])
        except BaseException:
            # Without a finished shard or a shard's journal there is nothing to resume from.
            kept = [*staging_dir.glob("*.idx"), *staging_dir.glob(f"*/{JOURNAL}")]
            if not kept:
                shutil.rmtree(staging_dir, ignore_errors=True)
            raise


def _make_and_merge(
    config: PreprocessConfig, files: list[str], report: Callable[[Progress], None]
) -> tuple[Progress, list[tuple[str, str]]]:
    """Make the shards, and merge them in the staging directory.

    Returns the progress of all together, and the renames (temporary name, final name) left to do.
    """
    start = time.perf_counter()
    # Make the shards that no earlier run finished.
    shards = [_shard_config(config, index) for index in range(config.partitions)]
    finished = []
    unfinished = []
    for shard in shards:
        if _is_finished(shard):
            finished.append(_stored_progress(shard))
        else:
            unfinished.append(shard)
    progress = _run_processes(unfinished, files, finished, config.max_bad_lines, report=report)
    # Together they may have no documents, or more bad lines than each by itself.
    if progress.bad_lines > config.max_bad_lines:
        raise too_many_bad_lines(
            progress.last_bad_line, progress.bad_lines, limit=config.max_bad_lines
        )
    if not progress.documents:
        shutil.rmtree(config.staging_dir)
        raise DatasetError(f"{', '.join(config.input)}: no documents")
    # Join their lists of bad lines, and merge their datasets.
    renames = []
    bad_lines = b""
    for shard in shards:
        if os.path.exists(shard.bad_lines):
            bad_lines += Path(shard.bad_lines).read_bytes()
    if bad_lines:
        joined = config.staging_dir / "bad_lines.tsv"
        joined.write_bytes(bad_lines)
        renames.append((str(joined), config.bad_lines))
    for key in config.json_keys:
        prefixes = [shard.prefix(key) for shard in shards]
        renames += merge_into(config.staging_dir, prefixes, config.prefix(key))
    progress.seconds = time.perf_counter() - start
    report(progress)
    return progress, renames


def _shard_config(config: PreprocessConfig, index: int) -> PreprocessConfig:
    return replace(
        config,
        output_prefix=str(config.staging_dir / "part"),
        shard=f"{index}/{config.partitions}",
        partitions=1,
        workers=max(1, config.workers // config.partitions),
    )


def _is_finished(shard: PreprocessConfig) -> bool:
    return all(dataset_path(shard.prefix(key), ".idx").exists() for key in shard.json_keys)


def _progress_path(shard: PreprocessConfig) -> Path:
    """Where the process that makes a shard stores its progress, before the shard is finished."""
    return Path(f"{shard.stem}.progress.json")


def _stored_progress(shard: PreprocessConfig) -> Progress:
    """The progress of a shard that an earlier run finished. Raises StagingError."""
    path = _progress_path(shard)
    try:
        return Progress.of_earlier_run(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        raise StagingError(
            f"{path} is missing or damaged: delete {path.parent} to start again"
        ) from None


def _run_processes(
    shards: list[PreprocessConfig],
    files: list[str],
    finished: list[Progress],
    max_bad_lines: int,
    report: Callable[[Progress], None],
) -> Progress:
    """Make each of the shards in a process of its own.

    Returns the progress of these and the `finished` ones together. Raises the first error of any,
    and BadLineError when all together have too many bad lines.
    """
    context = multiprocessing.get_context("spawn")
    processes: dict[Connection, multiprocessing.Process] = {}
    latest: dict[Connection, Progress] = {}
    total = Progress.total(finished)
    try:
        for shard in shards:
            ours, theirs = context.Pipe(duplex=False)
            processes[ours] = context.Process(target=_make, args=(shard, files, theirs))
            with sigint_blocked():
                processes[ours].start()
            theirs.close()
        waiting = set(processes)
        while waiting:
            for connection in wait(waiting):
                progress = _receive(connection, processes[connection])
                if progress is None:
                    waiting.remove(connection)
                    continue
                # The new report comes first: its bad line is the one that an error names.
                latest.pop(connection, None)
                total = Progress.total([progress, *latest.values(), *finished])
                latest[connection] = progress
                if total.bad_lines > max_bad_lines:
                    raise too_many_bad_lines(
                        total.last_bad_line, total.bad_lines, limit=max_bad_lines
                    )
            if len(latest) == len(shards):
                report(total)
        return total
    finally:
        for connection, process in processes.items():
            connection.close()
            process.terminate()
            process.join()


def _receive(connection: Connection, process: multiprocessing.Process) -> Progress | None:
    """The next report of a process, None when it has finished. Raises the error that it sends."""
    try:
        message = connection.recv()
    except EOFError:
        process.join()
        if process.exitcode:
            raise DatasetError(
                f"the process of a partition exited unexpectedly (exit code {process.exitcode}); "
                "its message, if any, is above"
            ) from None
        return None
    if isinstance(message, Exception):
        raise message
    return message


def _make(shard: PreprocessConfig, files: list[str], connection: Connection) -> None:
    """Make one shard, in a process of its own; it ends when the main process has ended."""

    def report(progress: Progress) -> None:
        if progress.finished:
            write_json(_progress_path(shard), asdict(progress))
        connection.send(progress)

    try:
        make_shard(shard, files, report)
    except BrokenPipeError:
        return
    except (DatasetError, OSError, ValueError) as error:
        connection.send(error)
