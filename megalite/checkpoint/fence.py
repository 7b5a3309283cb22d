"""One writer at a time: a run claims its folder, and a run that was replaced can write no checkpoint any more.

A node may be cut off while its job is requeued elsewhere: its ranks go on, come back, and must not write over what
their successor has saved. Looking at the lease before acting is not enough, since a run may be suspended in between; so
the owner acts only through a folder named by its token, its staging_dir. What is to be seen is renamed from there, what is to
go is renamed to there, and what is renamed beside it is named by a path through it. The next owner removes the staging_dir;
from then on each of these renames fails. Imports no torch.
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

from megalite.checkpoint.folder import CheckpointError, fsync_folder

OWNER_FILE = "owner.json"
CONTINUE_FILE = "to-be-continued"
"""Left by a run that its time limit ended: a job script that finds it starts the same command again."""
DESK = ".writing."
"""Before the owner's token: name of its staging_dir."""
MOVED_MEANWHILE = {errno.ENOENT, errno.ESTALE, errno.ENOTEMPTY, errno.EEXIST}
"""What removing a staging_dir may meet while its owner, or another run that claims the folder, moves what is in it."""


@dataclass(frozen=True)
class Lease:
    """The right to write checkpoints to a folder, until another run claims it."""

    root: Path
    token: str

    @classmethod
    def take(cls, root: str | Path) -> "Lease":
        """Lease a folder, made if it is absent. Once this returns, whoever held it before can change nothing there.

        Raises CheckpointError when yet another run claims it meanwhile, OSError when nothing can be written.
        """
        root = Path(root)
        root.mkdir(parents=True, exist_ok=True)
        job, restarts = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_RESTART_COUNT", "0")
        who = f"process {os.getpid()} on {os.uname().nodename}" + (
            f", job {job}, restart {restarts}" if job else ""
        )
        owner = {
            "token": uuid.uuid4().hex,
            "who": who,
            "since": datetime.now().isoformat(timespec="seconds"),
        }
        draft = root / f".{OWNER_FILE}.{owner['token']}"
        with open(draft, "w") as file:
            json.dump(owner, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, root / OWNER_FILE)
        lease = cls(root, owner["token"])
        lease.staging_dir.mkdir()
        desks = [
            staging_dir for staging_dir in root.glob(f"{DESK}*") if staging_dir != lease.staging_dir
        ]
        with lease._explaining():
            for staging_dir in desks:
                lease._remove_desk(staging_dir)
            with suppress(FileNotFoundError):
                os.rename(root / CONTINUE_FILE, lease.staging_dir / CONTINUE_FILE)
            lease.clear()
            fsync_folder(root)
        return lease

    @property
    def staging_dir(self) -> Path:
        """The folder through which the owner acts; gone once another run has claimed the root."""
        return self.root / f"{DESK}{self.token}"

    def _remove_desk(self, staging_dir: Path) -> None:
        """Take a staging_dir away that was found after this run had made its own."""
        while staging_dir.exists():
            # A staging_dir is made after its owner's name is there. So one that was found before this look is of a run before
            # this one: who claims the folder later loses nothing here, however late this run goes on.
            self.check()
            # Entry by entry, and deleted elsewhere: none may be renamed by its owner while only a part of it is left.
            try:
                for entry in staging_dir.iterdir():
                    os.rename(entry, self.staging_dir / uuid.uuid4().hex)
                staging_dir.rmdir()
            except OSError as error:
                if error.errno not in MOVED_MEANWHILE:
                    raise

    def clear(self) -> None:
        """Delete what lies on the staging_dir. What resists is told in a line, and left for the next time."""
        for entry in self.staging_dir.iterdir():
            try:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            except OSError as error:
                print(f"checkpoint: could not remove {entry}: {error}", flush=True)

    def check(self) -> None:
        """Raise CheckpointError when another run has claimed the folder, OSError or ValueError when owner.json cannot
        be read."""
        owner = json.loads((self.root / OWNER_FILE).read_text())
        if owner["token"] != self.token:
            raise CheckpointError(
                f"{self.root} now belongs to another run ({owner['who']}, since {owner['since']}): "
                "this one was replaced, and ends"
            )

    def request_requeue(self, reason: str) -> None:
        """Tell the job script that the run has saved and wants to go on. Raises CheckpointError when the run was
        replaced, OSError when the file cannot be written."""
        with self._explaining():
            (self.staging_dir / CONTINUE_FILE).write_text(reason + "\n")
            os.rename(self.staging_dir / CONTINUE_FILE, self.root / CONTINUE_FILE)

    @contextmanager
    def _explaining(self) -> Iterator[None]:
        """Around what the owner does: that it was replaced is the reason for whatever fails then."""
        try:
            yield
        except OSError:
            self.check()
            raise
