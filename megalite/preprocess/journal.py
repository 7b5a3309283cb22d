"""The staging directory in which output files grow, and the journal to resume from."""

import fcntl
import io
import json
import os
import shutil
import sys
from pathlib import Path
from typing import BinaryIO

from megalite.data.indexed import DatasetError

JOURNAL = "journal.json"


class StagingError(DatasetError):
    """The staging directory is in use, of another job, or damaged.

    Nothing was started, and the same command would fail again.
    """


class Journal:
    """The staging directory of one output while it is made, locked against other processes.

    Use it in a `with` block: leaving it with an error removes a directory from which no run can
    resume. File systems without locks are used without, after a warning.

    Args:
        staging_dir: the directory, created if it does not exist.
        job: what the output is made from and how, as JSON; another job's directory is refused.
        resumable: whether an interrupted run can resume; if not, what one left is refused.

    Raises:
        StagingError: another process is at work, or the directory is another job's or damaged.
    """

    def __init__(self, staging_dir: Path, job: dict, resumable: bool = True):
        self.staging_dir = staging_dir
        self._job = json.loads(json.dumps(job))
        self._resumable = resumable
        try:
            staging_dir.mkdir(exist_ok=True)
        except FileExistsError:
            raise StagingError(
                f"{staging_dir} is not a folder, but the output is to grow there: delete it"
            ) from None
        self._lock = open(staging_dir / "lock", "w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise StagingError(
                f"{staging_dir}: another process is writing this output; wait for it, or stop it"
            ) from None
        except OSError as error:  # Lustre and others may be mounted without locks
            print(
                f"{staging_dir} cannot be locked ({error}): start no second run of this output",
                file=sys.stderr,
            )
        try:
            self.state = self._read()
        except StagingError:
            self._lock.close()
            raise

    def _read(self) -> dict | None:
        """The state that an interrupted run committed, None if there is none."""
        path = self.staging_dir / JOURNAL
        if not path.exists():
            return None
        fix = f"delete {self.staging_dir} to start again"
        if not self._resumable:
            raise StagingError(f"standard input cannot be resumed: {fix}")
        try:
            stored = json.loads(path.read_text())
            before = dict(stored["job"])
            state = dict(stored["state"])
        except (ValueError, KeyError, TypeError):
            raise StagingError(f"{path} is damaged: {fix}") from None
        changes = []
        for key in {**before, **self._job}:
            if before.get(key) != self._job.get(key):
                changes.append(f"{key} was {_short(before, key)}, is {_short(self._job, key)}")
        if changes:
            raise StagingError(
                f"{self.staging_dir} is what an interrupted run left, which was another job: "
                f"{'; '.join(changes)}. Run that one again to finish it, or {fix}"
            )
        return state

    def commit(self, state: dict) -> None:
        """Store the state; all data that it counts must be on the disk already.

        After a crash, the journal holds either the new state or the one before.
        """
        draft = self.staging_dir / f"{JOURNAL}.draft"
        with open_named(draft, "w+") as file:
            file.write(json.dumps({"job": self._job, "state": state}).encode())
            sync_file(file)
        draft.rename(self.staging_dir / JOURNAL)
        self.state = state

    @property
    def is_complete(self) -> bool:
        """Whether all files are complete, and only their final names are missing."""
        return bool(self.state and self.state.get("renames"))

    def publish(self) -> None:
        """Rename complete files to their final names, except those renamed before an interruption,
        and remove the directory."""
        for source, final in self.state["renames"]:
            if os.path.exists(source):
                os.rename(source, final)
        shutil.rmtree(self.staging_dir)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, kind, *_) -> None:
        # Journals of partitions are in directories of their own in this one.
        resumes = self._resumable and (self.state or any(self.staging_dir.glob(f"*/{JOURNAL}")))
        if kind is not None and not resumes:
            shutil.rmtree(self.staging_dir, ignore_errors=True)
        self._lock.close()  # another process may use the directory now


class _NamedFile(io.FileIO):
    """A file whose path is in the error when it cannot be written, for example on a full disk."""

    def write(self, data) -> int:
        """Write bytes. Returns how many were written, which may be fewer."""
        try:
            return super().write(data)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.name)) from None


def open_named(path: Path, mode: str) -> BinaryIO:
    """A buffered binary file, to read and write, whose errors name its path."""
    return io.BufferedRandom(_NamedFile(path, mode))


def sync_file(file: BinaryIO) -> None:
    """Flush a file of `open_named` to the disk."""
    file.flush()
    try:
        os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file.raw.name)) from None


def _short(job: dict, key: str) -> str:
    text = json.dumps(job.get(key))
    return text if len(text) <= 80 else text[:77] + "..."
