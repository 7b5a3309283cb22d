"""All shards of a preprocessing at the same time on one machine (--partitions), then merged."""

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path

from megalite.data.indexed import DatasetError
from megalite.preprocess.config import PreprocessConfig
from megalite.preprocess.journal import Journal
from megalite.preprocess.merge import merge_into
from megalite.preprocess.progress import PreprocessProgress
from megalite.preprocess.shard import BAD_LINES, open_journal, too_many_bad_lines, write_shard
from megalite.preprocess.workers import reporting_exit, running


def write_partitions(
    config: PreprocessConfig, files: list[str], journal: Journal, report: Callable
) -> None:
    """Write what `write_shard` writes of all files, by --partitions processes, each one shard.

    Each shard grows in a staging directory of its own within the journal's, where it stays until
    all are merged: after an interruption, every process resumes there. Raises what `write_shard`
    raises.
    """
    start = time.perf_counter()
    journal.commit({})
    shards = [_shard_config(config, index) for index in range(config.partitions)]
    progress = _run_processes(config, shards, files, report)
    if not progress.documents:
        shutil.rmtree(config.staging_dir)
        raise DatasetError(f"{', '.join(config.input)}: no documents")
    # Join their lists of bad lines, and merge their datasets.
    renames = []
    bad_lines = b"".join((shard.staging_dir / BAD_LINES).read_bytes() for shard in shards)
    if bad_lines:
        joined = config.staging_dir / BAD_LINES
        joined.write_bytes(bad_lines)
        renames.append((str(joined), config.bad_lines))
    for key in config.json_keys:
        prefixes = [shard.staging_dir / Path(shard.prefix(key)).name for shard in shards]
        renames += merge_into(config.staging_dir, prefixes, config.prefix(key))
    progress.seconds = time.perf_counter() - start
    report(progress)
    journal.commit({"renames": renames, "progress": asdict(progress)})


def _shard_config(config: PreprocessConfig, index: int) -> PreprocessConfig:
    return replace(
        config,
        output_prefix=str(config.staging_dir / "part"),
        shard=f"{index}/{config.partitions}",
        partitions=1,
        workers=max(1, config.workers // config.partitions),
    )


def _run_processes(
    config: PreprocessConfig, shards: list[PreprocessConfig], files: list[str], report: Callable
) -> PreprocessProgress:
    """Write each of the shards in a process of its own. Returns the progress of all together.

    Raises the first error of any, and BadLineError when all together have too many bad lines.
    """
    latest: dict[Connection, PreprocessProgress] = {}
    with running(_write, [(shard, files) for shard in shards]) as processes:
        waiting = set(processes)
        while waiting:
            for connection in wait(waiting):
                with reporting_exit(processes[connection]):
                    message = connection.recv()
                if message is None:
                    waiting.remove(connection)
                    continue
                if isinstance(message, Exception):
                    raise message
                # The new report comes first: its bad line is the one that an error names.
                latest.pop(connection, None)
                total = PreprocessProgress.total([message, *latest.values()])
                latest[connection] = message
                if total.bad_lines > config.max_bad_lines:
                    raise too_many_bad_lines(total.last_bad_line, total.bad_lines, config)
            if len(latest) == len(shards):
                report(total)
    return total


def _write(connection: Connection, shard: PreprocessConfig, files: list[str]) -> None:
    """Write one shard, in a process of its own; it ends when the main process has ended."""
    try:
        with open_journal(shard, files) as journal:
            if journal.is_complete:
                connection.send(PreprocessProgress.restored(journal.state["progress"]))
            else:
                write_shard(shard, files, journal, connection.send)
        connection.send(None)
    except BrokenPipeError:
        return
    except (DatasetError, OSError, ValueError) as error:
        connection.send(error)
