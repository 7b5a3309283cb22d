"""A folder of checkpoints: names of what is in it, and which checkpoint is the latest. Imports no torch."""

import os
import re
from pathlib import Path

INDEX_FILE = "index.json"
STATE_FILE = "state.json"
LATEST_FILE = "latest_checkpointed_iteration.txt"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, or is not what was expected; the message says what and where."""


def iteration_folder(iteration: int) -> str:
    """`iter_0000100`."""
    return f"iter_{iteration:07d}"


def list_iterations(root: str | Path, replaced: bool = False) -> list[int]:
    """Iterations with a committed checkpoint under their own name in `root`, ascending; [] when
    there is no folder. replaced: also those whose checkpoint is moved aside, to be replaced."""
    pattern = re.compile(r"iter_(\d{7,})" + (r"(\.replaced-\d+)?" if replaced else ""))
    found = set()
    for index in Path(root).glob(f"iter_*/{INDEX_FILE}"):
        match = pattern.fullmatch(index.parent.name)
        if match:
            found.add(int(match[1]))
    return sorted(found)


def latest_iteration(root: str | Path) -> int | None:
    """The iteration that `latest_checkpointed_iteration.txt` names; None when there is no checkpoint at all.

    Without that file (the very first save was killed when its folder was complete, or a person removed the file) it is
    the highest iteration there is: a run never starts from scratch beside whole checkpoints.
    Raises CheckpointError when the file does not hold a number.
    """
    path = Path(root) / LATEST_FILE
    try:
        text = path.read_text().strip()
    except (FileNotFoundError, NotADirectoryError):
        return max(list_iterations(root), default=None)
    if not text.isdecimal():
        raise CheckpointError(f"{path} should hold an iteration number; it holds {text[:40]!r}")
    return int(text)


def replaced_folders(root: str | Path, iteration: int) -> list[Path]:
    """`iter_N.replaced-K` folders of an iteration, the newest (highest K) last."""
    prefix = f"{iteration_folder(iteration)}.replaced-"
    numbered = [
        path for path in Path(root).glob(f"{prefix}*") if path.name.removeprefix(prefix).isdecimal()
    ]
    return sorted(numbered, key=lambda path: int(path.name.removeprefix(prefix)))


def checkpoint_folder(root: str | Path, iteration: int) -> Path | None:
    """Where a checkpoint lies: `iter_N`, or, when a run was killed between moving an old one aside and moving the new
    one in (see save.py), what it had moved aside. None when there is neither."""
    folders = [
        Path(root) / iteration_folder(iteration),
        *reversed(replaced_folders(root, iteration)),
    ]
    return next((folder for folder in folders if (folder / INDEX_FILE).is_file()), None)


def fsync_folder(path: Path) -> None:
    """Make the folder's entries (new files, renames) survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
