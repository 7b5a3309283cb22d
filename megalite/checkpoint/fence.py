"""One writer at a time: a run takes the lease of its folder; a replaced run can write nothing more.

A node may be cut off while its job is requeued elsewhere. Its ranks continue, come back, and must
not overwrite what their successor has saved. Checking the lease before each operation is not
enough, since a run may be suspended between check and operation. So the owner works only through a
folder that is named by its token, its staging directory:

- what becomes visible is renamed from there,
- what is removed is renamed to there,
- what is renamed beside it is named by a path through it.

The next owner removes the staging directory; each of these renames then fails. Imports no torch.
"""

import errno
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from megalite.checkpoint.folder import (
    CheckpointError,
    DamagedCheckpointError,
    fsync_folder,
    read_json,
    write_text,
)
from megalite.system.errors import explain_os_error

OWNER_FILE = "owner.json"
CONTINUE_FILE = "to-be-continued"
"""Left by a run that its time limit ended: a job script that finds it starts the same command
again."""
STAGING_PREFIX = ".writing."
"""A staging directory is named by this and its owner's token."""
MOVED_MEANWHILE = {errno.ENOENT, errno.ESTALE, errno.ENOTEMPTY, errno.EEXIST}
"""Errors of removing a staging directory while its owner, or another run that takes the lease,
moves its entries."""


@dataclass(frozen=True)
class Lease:
    """The right to write checkpoints to a folder, until another run takes the lease."""

    root: Path
    token: str

    @classmethod
    def take(cls, root: str | Path) -> "Lease":
        """Take the lease of a folder, which is made if it is absent.

        Once this returns, the previous owner can change nothing there. Raises CheckpointError when
        a third run takes the lease meanwhile, OSError, with the path, when the folder cannot be
        written to.
        """
        root = Path(root)
        root.mkdir(parents=True, exist_ok=True)
        # 1. Become the owner: from here on, the previous owner's check() fails.
        owner = _new_owner()
        token = owner["token"]
        draft = root / f".{OWNER_FILE}.{token}"
        write_text(draft, json.dumps(owner))
        os.replace(draft, root / OWNER_FILE)
        # 2. Make a staging directory, and only then list those of earlier owners.
        lease = cls(root, token)
        lease.staging_dir.mkdir()
        earlier = [path for path in root.glob(f"{STAGING_PREFIX}*") if path != lease.staging_dir]
        # 3. Remove them, and whatever earlier runs left.
        with lease._naming_successor():
            for staging_dir in earlier:
                lease._remove_staging_dir(staging_dir)
            with suppress(FileNotFoundError):
                os.rename(root / CONTINUE_FILE, lease.staging_dir / CONTINUE_FILE)
            lease.clear()
            fsync_folder(root)
        return lease

    @property
    def staging_dir(self) -> Path:
        """The folder through which the owner works; gone once another run has taken the lease."""
        return self.root / f"{STAGING_PREFIX}{self.token}"

    def _remove_staging_dir(self, staging_dir: Path) -> None:
        """Remove an earlier owner's staging directory, listed after this run had made its own."""
        while staging_dir.exists():
            # A run makes its staging directory only after it has written its name to owner.json.
            # If this run still owns the folder here, the listed directory is of an earlier owner.
            # A run that takes the lease later loses nothing, however late this one continues.
            self.check()
            # Move each entry out before it is deleted, so that its owner cannot rename an entry
            # that is half deleted.
            try:
                for entry in staging_dir.iterdir():
                    os.rename(entry, self.staging_dir / uuid.uuid4().hex)
                staging_dir.rmdir()
            except OSError as error:
                if error.errno not in MOVED_MEANWHILE:
                    raise

    def clear(self) -> None:
        """Delete what is in the staging directory. An entry that cannot be deleted is reported in
        a line and left for the next time."""
        for entry in self.staging_dir.iterdir():
            try:
                if entry.is_dir():
                    shutil.rmtree(entry)
                else:
                    entry.unlink()
            except OSError as error:
                reason = explain_os_error(error)
                print(f"checkpoint: could not remove {entry}: {reason}", flush=True)

    def check(self) -> None:
        """Raise CheckpointError when another run has taken the lease, ValueError when owner.json
        cannot be read."""
        path = self.root / OWNER_FILE
        try:
            owner = read_json(path)
            token, who, since = (str(owner[key]) for key in ("token", "who", "since"))
        except (DamagedCheckpointError, KeyError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        if token != self.token:
            raise CheckpointError(
                f"{self.root} now belongs to another run ({who}, since {since}): "
                "this one was replaced, and ends"
            )

    def request_requeue(self, reason: str) -> None:
        """Ask the job script to start the run, which has saved, again.

        Raises CheckpointError when the run was replaced, OSError, with the file, when it cannot be
        written.
        """
        with self._naming_successor():
            draft = self.staging_dir / CONTINUE_FILE
            write_text(draft, reason + "\n")
            os.rename(draft, self.root / CONTINUE_FILE)

    @contextmanager
    def _naming_successor(self) -> Iterator[None]:
        """When the owner's file operation fails because it was replaced, raise that reason."""
        try:
            yield
        except OSError:
            self.check()
            raise


def _new_owner() -> dict[str, str]:
    """The content of owner.json for this process."""
    who = f"process {os.getpid()} on {os.uname().nodename}"
    if job := os.environ.get("SLURM_JOB_ID"):
        who += f", job {job}, restart {os.environ.get('SLURM_RESTART_COUNT', '0')}"
    since = datetime.now().isoformat(timespec="seconds")
    return {"token": uuid.uuid4().hex, "who": who, "since": since}
