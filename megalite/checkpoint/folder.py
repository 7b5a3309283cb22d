"""The folder of a run's checkpoints: its files, its iterations, and the latest. No torch here."""

import os
import re
from pathlib import Path

from megalite.system.errors import ReportedError

INDEX_FILE = "index.json"
STATE_FILE = "state.json"
CONFIG_FILE = "config.yaml"
LATEST_FILE = "latest_checkpointed_iteration.txt"


class CheckpointError(ReportedError, RuntimeError):
    """A checkpoint cannot be written, or is not as expected; the message says what and where."""


def iteration_folder(iteration: int) -> str:
    """`iter_0000100`."""
    return f"iter_{iteration:07d}"


def list_iterations(root: str | Path, replaced: bool = False) -> list[int]:
    """Iterations with a committed checkpoint under their own name in `root`, ascending; [] when
    there is no folder. replaced: also those whose checkpoint is moved aside, to be replaced.

    A folder that is itself one checkpoint, `SAVE/iter_0000100`, holds that iteration.
    """
    pattern = re.compile(r"iter_(\d{7,})" + (r"(\.replaced-\d+)?" if replaced else ""))
    found = set()
    for index in Path(root).glob(f"iter_*/{INDEX_FILE}"):
        match = pattern.fullmatch(index.parent.name)
        if match:
            found.add(int(match[1]))
    if not found and (own := _own_iteration(root)) is not None:
        return [own]
    return sorted(found)


def _own_iteration(folder: str | Path) -> int | None:
    """The iteration of the one checkpoint that `folder` is; None when it is no checkpoint."""
    if not (Path(folder) / INDEX_FILE).is_file():
        return None
    match = re.fullmatch(r"iter_(\d{7,})(\.replaced-\d+)?", Path(folder).resolve().name)
    return int(match[1]) if match else None


def save_folder(load: str | Path) -> Path:
    """The folder that holds the checkpoints of `load`: its parent when `load` is one checkpoint."""
    if _own_iteration(load) is None or (Path(load) / LATEST_FILE).exists():
        return Path(load)
    return Path(load).resolve().parent


def latest_iteration(root: str | Path) -> int | None:
    """The iteration that `latest_checkpointed_iteration.txt` names; None without any checkpoint.

    The file may be missing: the very first save was killed when its folder was complete, or a
    person removed the file. Then it is the highest iteration there is, since a run must never start
    from scratch beside complete checkpoints. Raises CheckpointError when the file does not hold a
    number.
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
    numbered = {}
    for path in Path(root).glob(f"{prefix}*"):
        number = path.name.removeprefix(prefix)
        if number.isdecimal():
            numbered[int(number)] = path
    return [numbered[number] for number in sorted(numbered)]


def checkpoint_folder(root: str | Path, iteration: int) -> Path | None:
    """The folder of a checkpoint in `root`; None when there is none of this iteration.

    It is `iter_N`. When a run was killed between moving an old `iter_N` aside and moving the new
    one in (see save.py), it is the old one under its new name. When `root` itself is the
    checkpoint, it is `root`.
    """
    candidates = [Path(root) / iteration_folder(iteration)]
    candidates += reversed(replaced_folders(root, iteration))
    for folder in candidates:
        if (folder / INDEX_FILE).is_file():
            return folder
    return Path(root) if _own_iteration(root) == iteration else None


def find_checkpoint(root: Path, step: int | None) -> Path:
    """The folder of the latest checkpoint in `root`, or of that of iteration `step`.

    Raises CheckpointError, with the checkpoints that exist, when it is not there.
    """
    there = ", ".join(map(iteration_folder, list_iterations(root))) or "no checkpoint"
    iteration = latest_iteration(root) if step is None else step
    if iteration is None:
        raise CheckpointError(f"{root / LATEST_FILE} does not exist; {root} holds {there}")
    folder = checkpoint_folder(root, iteration)
    if folder is None:
        wanted = root / iteration_folder(iteration)
        raise CheckpointError(f"{wanted} does not exist; {root} holds {there}")
    return folder


def fsync_folder(path: Path) -> None:
    """Flush the folder's entries to the disk: new files and renames survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
