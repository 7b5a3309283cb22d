"""Where an interrupted preprocessing goes on: growing files in a folder, and a journal of how far they are good."""

import fcntl
import json
import os
import shutil
import sys
from pathlib import Path

from megalite.data.indexed import DatasetError

JOURNAL = "journal.json"


class FolderError(DatasetError):
    """The folder is in use, another job's, or damaged: nothing was begun, and the same command would not do either."""


class Journal:
    """The folder of one output while it is made. One process at a time has it, where the file system knows locks.

    Use it in a `with` block: leaving it with an error removes a folder from which nothing can go on.

    job: what the output is made from and how, as JSON. A folder that another job left is refused.
    resumable: whether an interrupted run can go on; if not, what a killed one left is refused.
    Raises FolderError when another process is at work, or the folder is another job's.
    """

    def __init__(self, folder: Path, job: dict, resumable: bool = True):
        self.folder, self._job, self._resumable = folder, json.loads(json.dumps(job)), resumable
        try:
            folder.mkdir(exist_ok=True)
        except FileExistsError:
            raise FolderError(
                f"{folder} is no folder, but the output is to grow there: delete it"
            ) from None
        self._lock = open(folder / "lock", "w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise FolderError(
                f"{folder}: another process is writing this output; wait for it, or stop it"
            ) from None
        except OSError as error:  # Lustre and others may be mounted without locks
            print(
                f"{folder} cannot be locked ({error}): start no second run of this output",
                file=sys.stderr,
            )
        try:
            self.state = self._read()
        except FolderError:
            self._lock.close()
            raise

    def _read(self) -> dict | None:
        path = self.folder / JOURNAL
        if not path.exists():
            return None
        if not self._resumable:
            raise FolderError(
                f"standard input cannot be taken up again: delete {self.folder} to start anew"
            )
        try:
            stored = json.loads(path.read_text())
            before, state = stored["job"], stored["state"]
        except (ValueError, KeyError, TypeError):
            raise FolderError(f"{path} is damaged: delete {self.folder} to start anew") from None
        different = [
            key for key in {**before, **self._job} if before.get(key) != self._job.get(key)
        ]
        if different:
            changes = "; ".join(
                f"{key} was {_short(before.get(key))}, is {_short(self._job.get(key))}"
                for key in different
            )
            raise FolderError(
                f"{self.folder} is what an interrupted run left, which was another job: {changes}. Run that one again "
                f"to finish it, or delete {self.folder} to start anew"
            )
        return state

    def commit(self, state: dict) -> None:
        """Write the state; whatever it counts must be on the disk already."""
        path, draft = self.folder / JOURNAL, self.folder / (JOURNAL + ".draft")
        with open(draft, "w") as file:
            json.dump({"job": self._job, "state": state}, file)
            file.flush()
            os.fsync(file.fileno())
        draft.rename(path)
        self.state = state

    def end(self, renames: list[tuple[str, str]]) -> None:
        """Give complete files their final names, whichever have them already, and remove the folder."""
        for source, final in renames:
            if os.path.exists(source):
                os.rename(source, final)
        shutil.rmtree(self.folder)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is not None and (self.state is None or not self._resumable):
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()  # another process may have the folder now


def _short(value) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
