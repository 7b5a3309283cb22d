"""Several shards of one preprocessing at once on one machine, then merged."""

import multiprocessing
import shutil
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from pathlib import Path

from megalite.data.indexed import DatasetError, DatasetInfo, dataset_path
from megalite.data.inputs import expand
from megalite.data.journal import JOURNAL, Journal
from megalite.data.merge import merge
from megalite.data.preprocess import BadLineError, job_of, preprocess
from megalite.data.preprocess_config import PreprocessConfig
from megalite.data.progress import Progress


def preprocess_in_partitions(config: PreprocessConfig, report: Callable[[Progress], None]) -> list[DatasetInfo]:
    """What `preprocess` does, by --partitions processes with outputs of their own.

    Finished parts are kept when it is interrupted, and unfinished ones go on. Raises what `preprocess` raises.
    """
    files, problems = expand(config.input)
    if problems:
        raise DatasetError("; ".join(problems))
    journal = Journal(config.folder, job_of(config, files))
    try:
        if journal.state is None:
            journal.commit({"renames": []})
        parts = [_part(config, number) for number in range(config.partitions)]
        left = [part for part in parts if not all(_exists(part.prefix(key)) for key in config.json_keys)]
        _run(left, report)
        bad = [Path(f"{part.stem}.bad_lines.tsv") for part in parts]
        lines = b"".join(path.read_bytes() for path in bad if path.exists())
        if lines.count(b"\n") > config.max_bad_lines:
            most = config.max_bad_lines
            raise BadLineError(f"{lines.count(10)} lines are no documents, --max-bad-lines allows {most}")
        if not any(DatasetInfo.read(part.prefix(config.json_keys[0])).documents for part in parts):
            shutil.rmtree(config.folder)
            raise DatasetError(f"{', '.join(config.input)}: no documents")
        infos = []
        for key in config.json_keys:
            if not _exists(config.prefix(key)):
                merge([part.prefix(key) for part in parts], config.prefix(key))
            infos.append(DatasetInfo.read(config.prefix(key)))
        if lines:
            Path(f"{config.stem}.bad_lines.tsv").write_bytes(lines)
        shutil.rmtree(config.folder)
    except BaseException:
        if not [*config.folder.glob("*.idx"), *config.folder.glob(f"*/{JOURNAL}")]:
            shutil.rmtree(config.folder, ignore_errors=True)  # no part has anything to go on from
        raise
    finally:
        journal.close()
    return infos


def _part(config: PreprocessConfig, number: int) -> PreprocessConfig:
    shard = f"{number}/{config.partitions}"
    workers = max(1, config.workers // config.partitions)
    return replace(config, output_prefix=str(config.folder / "part"), shard=shard, partitions=1, workers=workers)


def _exists(prefix: str) -> bool:
    return dataset_path(prefix, ".idx").exists()


def _run(parts: list[PreprocessConfig], report: Callable[[Progress], None]) -> None:
    """Run the parts, each in a process. Raises the first error of any."""
    context = multiprocessing.get_context("spawn")
    running: dict[Connection, multiprocessing.Process] = {}
    progress: dict[Connection, Progress] = {}
    try:
        for part in parts:
            ours, theirs = context.Pipe(duplex=False)
            running[ours] = context.Process(target=_make, args=(part, theirs))
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
                        raise DatasetError(f"a part ended with status {running[connection].exitcode}") from None
                    waiting.remove(connection)
                    continue
                if isinstance(told, Exception):
                    raise told
                progress[connection] = told
            if len(progress) == len(parts):
                report(Progress.total(list(progress.values())))
    finally:
        for connection, process in running.items():
            connection.close()
            process.terminate()
            process.join()


def _make(part: PreprocessConfig, connection: Connection) -> None:
    """One part, in a process of its own; it ends when nobody listens any more."""
    try:
        preprocess(part, connection.send)
    except BrokenPipeError:
        return
    except (DatasetError, OSError, ValueError) as error:
        connection.send(error)
