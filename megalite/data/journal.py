"""Where an interrupted preprocessing goes on: growing files in a folder, and a journal of how far they are good."""

import fcntl
import json
import os
import shutil
from pathlib import Path

from megalite.data.indexed import DatasetError

JOURNAL = "journal.json"


class FolderError(DatasetError):
    """The folder is in use, or another job's: nothing was begun."""


class Journal:
    """The folder of one output while it is made. One process at a time has it.

    job: what the output is made from and how, as JSON. A folder that another job left is refused.
    Raises FolderError when another process is at work, or the folder is another job's.
    """

    def __init__(self, folder: Path, job: dict):
        self.folder, self._job = folder, json.loads(json.dumps(job))
        folder.mkdir(exist_ok=True)
        self._lock = open(folder / "lock", "w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise FolderError(f"{folder}: another process is writing this output; wait for it, or stop it") from None
        try:
            self.state = self._read()
        except FolderError:
            self._lock.close()
            raise

    def _read(self) -> dict | None:
        path = self.folder / JOURNAL
        if not path.exists():
            return None
        try:
            stored = json.loads(path.read_text())
            before, state = stored["job"], stored["state"]
        except (ValueError, KeyError, TypeError):
            raise FolderError(f"{path} is damaged: delete {self.folder} to start anew") from None
        different = [key for key in {**before, **self._job} if before.get(key) != self._job.get(key)]
        if different:
            changes = "; ".join(
                f"{key} was {_short(before.get(key))}, is {_short(self._job.get(key))}" for key in different
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
        self.close()

    def close(self) -> None:
        """Let another process have the folder."""
        self._lock.close()


def _short(value) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
