"""One writer at a time: a run claims its folder, and a run that was replaced can write no checkpoint any more.

A node may be cut off while its job is requeued elsewhere: its ranks go on, come back, and must not write over what
their successor has saved. Imports no torch.
"""

import json
import os
import uuid
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from megalite.checkpoint.folder import CheckpointError, fsync_folder, remove_drafts

OWNER_FILE = "owner.json"
CONTINUE_FILE = "to-be-continued"
"""Left by a run that its time limit ended: a job script that finds it starts the same command again."""


@dataclass(frozen=True)
class Claim:
    """The right to write checkpoints to a folder, until another run claims it."""

    root: Path
    token: str

    @classmethod
    def take(cls, root: str | Path) -> "Claim":
        """Claim a folder, made if it is absent. Whoever held it before cannot commit what it has begun to write."""
        root = Path(root)
        root.mkdir(parents=True, exist_ok=True)
        job, restarts = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_RESTART_COUNT", "0")
        who = f"process {os.getpid()} on {os.uname().nodename}" + (f", job {job}, restart {restarts}" if job else "")
        owner = {"token": uuid.uuid4().hex, "who": who, "since": datetime.now().isoformat(timespec="seconds")}
        draft = root / f".{OWNER_FILE}.{owner['token']}"
        with open(draft, "w") as file:
            json.dump(owner, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, root / OWNER_FILE)
        # The old owner may have looked at the file just before. Its draft is gone now, so it has nothing to commit.
        remove_drafts(root)
        (root / CONTINUE_FILE).unlink(missing_ok=True)
        fsync_folder(root)
        return cls(root, owner["token"])

    def check(self) -> None:
        """Raise CheckpointError when another run has claimed the folder."""
        try:
            owner = json.loads((self.root / OWNER_FILE).read_text())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.root / OWNER_FILE} cannot be read ({error}): whose folder is it?") from None
        if owner["token"] != self.token:
            raise CheckpointError(
                f"{self.root} now belongs to another run ({owner['who']}, since {owner['since']}): "
                "this one was replaced, and ends"
            )

    def ask_to_be_continued(self, reason: str) -> None:
        """Tell the job script that the run has saved and wants to go on."""
        (self.root / CONTINUE_FILE).write_text(reason + "\n")
