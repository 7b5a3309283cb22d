"""The folder of a run's checkpoints: its files, its iterations, and the latest. No torch here."""

import json
import os
import re
import stat
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from megalite.system.errors import ReportedError, error_message

INDEX_FILE = "index.json"
STATE_FILE = "state.json"
CONFIG_FILE = "config.yaml"
LATEST_FILE = "latest_checkpointed_iteration.txt"

LARGEST_TEXT = 4 << 30
"""Bytes of the largest text file that is read: an index of 100,000 ranks is smaller."""
SHOWN_PROBLEMS = 20
"""Problems that a message lists."""


class CheckpointError(ReportedError, RuntimeError):
    """A checkpoint cannot be written, or is not as expected; the message says what and where."""


class DamagedCheckpointError(CheckpointError):
    """A file of a checkpoint is missing, cannot be read, or is not what was written."""


def listing(heading: str, problems: Sequence[str], total: int | None = None) -> str:
    """A message of one line per problem, at most SHOWN_PROBLEMS. total: how many there are
    (default: all of `problems`)."""
    shown = problems[:SHOWN_PROBLEMS]
    lines = [heading, *shown]
    unshown = (total or len(problems)) - len(shown)
    if unshown:
        lines.append(f"and {unshown} more")
    return "\n  ".join(lines)


def read_file(path: Path) -> bytes:
    """The content of a text file of a checkpoint. Raises DamagedCheckpointError when it cannot be
    read, or is no regular file."""
    descriptor = open_regular(path)
    try:
        size = os.fstat(descriptor).st_size
        if size > LARGEST_TEXT:
            raise DamagedCheckpointError(f"{path} has {size} bytes: it is no file of megalite")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read()
    except OSError as error:
        raise _unreadable(path, error) from error
    finally:
        os.close(descriptor)


def open_regular(path: Path) -> int:
    """A descriptor of a file to read. Raises DamagedCheckpointError when there is none, or it is no
    regular file: a folder, or a pipe or device, which reading might wait for."""
    try:
        if stat.S_ISREG(path.stat().st_mode):
            return os.open(path, os.O_RDONLY)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    kind = "a folder" if path.is_dir() else "a pipe, device or socket"
    raise DamagedCheckpointError(f"{path} is {kind} instead of a file")


def _unreadable(path: Path, error: Exception) -> DamagedCheckpointError:
    if isinstance(error, FileNotFoundError):
        return DamagedCheckpointError(f"{path} is missing")
    if isinstance(error, OSError) and error.filename is None:  # those of read() name no file
        error = OSError(error.errno, error.strerror, str(path))
    return DamagedCheckpointError(f"{path} cannot be read: {error_message(error)}")


def read_json(path: Path) -> dict:
    """A JSON object from a file. Raises DamagedCheckpointError, as `read_file` and `parse_json`."""
    return parse_json(read_file(path), path)


def parse_json(content: bytes | str, source: object) -> dict:
    """A JSON object without duplicate keys.

    Raises DamagedCheckpointError, with `source`, for anything else.
    """

    def without_duplicates(pairs: list) -> dict:
        found = dict(pairs)
        if len(found) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in found if keys.count(key) > 1)
            raise ValueError(f"the key {twice!r} is there twice")
        return found

    try:
        parsed = json.loads(content, object_pairs_hook=without_duplicates)
    except (ValueError, RecursionError, MemoryError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise DamagedCheckpointError(f"{source} is damaged ({reason})") from error
    if not isinstance(parsed, dict):
        raise DamagedCheckpointError(f"{source} is damaged (no JSON object)")
    return parsed


def parse_text(content: bytes, source: object) -> str:
    """Text in UTF-8. Raises DamagedCheckpointError."""
    try:
        return content.decode()
    except ValueError as error:
        raise DamagedCheckpointError(f"{source} is damaged ({error})") from error


def write_text(path: Path, text: str) -> None:
    """Write a short text file through to the disk (fsync). Raises OSError, with the path, when that
    fails; then nothing is left of the file."""
    try:
        with open(path, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:  # those of write() and fsync() name no file
        with suppress(OSError):
            path.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from None


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


def _own_iteration(folder: str | Path, damaged: bool = False) -> int | None:
    """The iteration of the one checkpoint that `folder` is; None when it is no checkpoint. damaged:
    also of one that has lost its index."""
    folder = Path(folder)
    is_one = (folder / INDEX_FILE).is_file()
    if damaged and not is_one:
        is_one = any(folder.glob("weights-*.safetensors"))
    match = re.fullmatch(r"iter_(\d{7,})(\.replaced-\d+)?", folder.resolve().name)
    return int(match[1]) if is_one and match else None


def save_folder(load: str | Path) -> Path:
    """The folder that holds the checkpoints of `load`: its parent when `load` is one checkpoint,
    also a damaged one."""
    if _own_iteration(load, damaged=True) is None or (Path(load) / LATEST_FILE).exists():
        return Path(load)
    return Path(load).resolve().parent


def latest_iteration(root: str | Path) -> int | None:
    """The iteration that `latest_checkpointed_iteration.txt` names; None without any checkpoint.

    The file may be missing: the very first save was killed when its folder was complete, or a
    person removed the file. Then it is the highest iteration there is, since a run must never start
    from scratch beside complete checkpoints. Raises DamagedCheckpointError when the file does not
    hold a number. The checkpoint may be missing, or without its index.
    """
    path = Path(root) / LATEST_FILE
    if not os.path.lexists(path):
        return max(list_iterations(root), default=_own_iteration(root, damaged=True))
    text = read_file(path)[:40].decode(errors="replace").strip()
    if not re.fullmatch("[0-9]{1,18}", text):
        raise DamagedCheckpointError(f"{path} should hold an iteration number; it holds {text!r}")
    return int(text)


def has_checkpoint(root: str | Path) -> bool:
    """Whether a run with this --load resumes, and does not start from scratch."""
    if os.path.lexists(Path(root) / LATEST_FILE) or list_iterations(root):
        return True
    return _own_iteration(root, damaged=True) is not None


def history_before(state: dict, root: str | Path, iteration: int) -> list[int]:
    """The iterations of the checkpoints in `root` that a run had passed through before it wrote the
    one of `iteration`, whose state.json is `state`. A checkpoint of before, which does not say so,
    has all lower ones there. Raises DamagedCheckpointError when it holds no list of numbers."""
    history = state.get("history")
    if history is None:
        return [step for step in list_iterations(root) if step < iteration]
    if not isinstance(history, list) or any(type(step) is not int for step in history):
        raise DamagedCheckpointError(f"{STATE_FILE} of iteration {iteration}: history is no list")
    return history


def iterations_before(root: str | Path, iteration: int) -> tuple[list[int], bool]:
    """(the checkpoints in `root` to go back to when that of `iteration` is damaged, the nearest
    first; whether they are known to be of its own run). They are unknown when its state.json cannot
    be read: then they are all lower ones."""
    lower = [step for step in reversed(list_iterations(root)) if step < iteration]
    folder = checkpoint_folder(root, iteration) or index_path(root, iteration).parent
    try:
        history = history_before(read_json(folder / STATE_FILE), root, iteration)
    except DamagedCheckpointError:
        return lower, False
    return [step for step in lower if step in history], True


def iterations_to_try(root: str | Path) -> tuple[list[int], str, bool]:
    """(the iteration to load from `root`, and those to go back to when it is damaged, in this
    order; what is wrong with the file that names the latest, or ""; whether those to go back to are
    known to be of its own run).

    When that file is damaged, they are all that are stored. Empty without any checkpoint.
    """
    try:
        latest = latest_iteration(root)
    except DamagedCheckpointError as error:
        return list_iterations(root)[::-1], str(error), False
    if latest is None:
        return [], "", True
    earlier, are_known = iterations_before(root, latest)
    return [latest, *earlier], "", are_known


def nearest_before(root: str | Path) -> int | None:
    """The iteration to offer in place of the latest in `root`, when that one is damaged: the
    nearest of its run before it, in `save_folder`; None when there is none."""
    steps, damage, _ = iterations_to_try(root)
    if not damage and steps:
        steps, _ = iterations_before(save_folder(root), steps[0])
    return steps[0] if steps else None


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
        if os.path.lexists(folder / INDEX_FILE):
            return folder
    return Path(root) if _own_iteration(root) == iteration else None


def index_path(root: str | Path, iteration: int) -> Path:
    """Where the index of an iteration should be in `root`, which may itself be the checkpoint."""
    root = Path(root)
    if _own_iteration(root, damaged=True) == iteration:
        return root / INDEX_FILE
    return root / iteration_folder(iteration) / INDEX_FILE


def why_absent(root: str | Path, iteration: int) -> str:
    """What is missing of a checkpoint of which `checkpoint_folder` finds none."""
    index = index_path(root, iteration)
    if index.parent.exists():
        return f"{index} is missing"
    return f"{index.parent} does not exist"


def find_checkpoint(root: str | Path, step: int | None) -> Path:
    """The folder of the latest checkpoint in `root`, or of that of iteration `step`.

    Raises CheckpointError when there is none, DamagedCheckpointError, with the checkpoints that
    exist, when this one is missing or has no index.
    """
    iteration = latest_iteration(root) if step is None else step
    if iteration is None:
        raise CheckpointError(f"{root} holds no checkpoint, and no {LATEST_FILE}")
    folder = checkpoint_folder(root, iteration)
    if folder is not None:
        return folder
    parent = save_folder(root)
    there = ", ".join(map(iteration_folder, list_iterations(parent))) or "no checkpoint"
    message = f"{why_absent(root, iteration)}; {parent} holds {there}"
    earlier, _ = iterations_before(parent, iteration)
    if earlier:
        message += f", of which {parent / iteration_folder(earlier[0])} is the nearest before it"
    raise DamagedCheckpointError(message)


def fsync_folder(path: Path) -> None:
    """Flush the folder's entries to the disk: new files and renames survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
