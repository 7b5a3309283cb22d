"""A folder that appears whole or not at all. Imports no torch."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megalite.checkpoint.folder import CheckpointError, fsync_folder
from megalite.system.errors import explain_os_error, size_text

SPARE_BYTES = 1 << 24
"""Of the disk, for files beside the weights."""


def folder_problem(folder: Path) -> str | None:
    """Why a folder cannot be made: there is something in its place that would be overwritten, or
    nothing can be written where it would be."""
    whole = _in_place(folder)
    is_empty = whole.is_dir() and not any(whole.iterdir())
    if not is_empty and (whole.exists() or whole.is_symlink()):
        return f"{folder} exists already, and nothing is overwritten: give another folder"
    above = next(path for path in whole.parents if path.exists())
    if not above.is_dir():
        return f"{folder}: {above} is a file, not a folder: give another folder"
    if not os.access(above, os.W_OK | os.X_OK):
        return f"{folder}: nothing can be written in {above}: give another folder"
    return None


def _in_place(folder: Path) -> Path:
    """The folder's whole path, without `..`, which may lead through folders that are not there."""
    return folder.parent.resolve() / folder.name


def check_space(folder: Path, needed: int) -> None:
    """Raise CheckpointError unless the disk of `folder` has room for this many bytes."""
    whole = folder.absolute()
    existing = next(path for path in (whole, *whole.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed + SPARE_BYTES:
        wanted = f"{folder} will need {size_text(needed)}"
        there = f"{existing} has {size_text(free)} free"
        raise CheckpointError(f"{wanted}, and {there}: make room, or give another folder")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A draft of `folder` to write into, which is renamed to `folder` at the end of the block.

    The draft is a hidden folder beside it. When the block raises, it is removed; what a killed
    process left is removed by the next one. Raises CheckpointError when `folder` is there already,
    or another process is making it.
    """
    problem = folder_problem(folder)
    if problem:
        raise CheckpointError(problem)
    folder = _in_place(folder)
    draft = folder.with_name(f".{folder.name}.converting")
    try:
        draft.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(draft, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(explain_os_error(error)) from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CheckpointError(f"another process is writing {folder}") from None
        _empty(draft)
        try:
            yield draft
            fsync_folder(draft)
            os.rename(draft, folder)  # which replaces an empty folder only
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
        fsync_folder(folder.parent)
    finally:
        os.close(descriptor)


def _empty(folder: Path) -> None:
    """Remove what a killed process left."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
