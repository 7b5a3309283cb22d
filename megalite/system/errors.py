"""What an error of the operating system means for a person: the file, the limit, and what helps.
Imports no torch."""

import errno
import getpass
import os
import resource
import shutil
import stat
from collections.abc import Callable, Sequence
from pathlib import Path

ALMOST_FULL_BYTES = 1 << 20
"""With less than this free, a file system is full; with more, something else is the limit."""


class ReportedError(Exception):
    """An error whose message says what is wrong and what helps, so that a program prints the
    message in place of a traceback."""


def explain_os_error(error: OSError) -> str:
    """One line that names the file, the limit that was met and a remedy.

    Errors that need no explanation come back as Python words them.
    """
    explanation = _EXPLANATIONS.get(error.errno)
    if explanation is None:
        return str(error)
    subject = str(error.filename) if error.filename is not None else ""
    start = f"{subject}: {error.strerror}" if subject else str(error.strerror)
    try:
        return f"{start}: {explanation(subject)}"
    except OSError:  # the file system that is asked does not answer
        return str(error)


def error_message(error: BaseException) -> str:
    """The message of any error: explained where it is one of the operating system."""
    return explain_os_error(error) if isinstance(error, OSError) else str(error)


def scaled(number: float, units: Sequence[str], step: int) -> str:
    """Three digits and the unit: each unit is `step` times the one before."""
    for unit in units[:-1]:
        if number < step - 0.5:
            return f"{number:.3g}{unit}"
        number /= step
    return f"{number:.3g}{units[-1]}"


def raise_open_file_limit() -> int:
    """Raise the soft limit of open files to the hard one, as far as the system allows; returns the
    limit in force.

    Datasets and the connections of ranks need more files than the usual soft limit of 1024.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return soft
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError):  # a hard limit that the kernel does not grant
        return soft
    return hard


def _existing_parent(path: str) -> Path:
    """The path itself, or the nearest folder above it that exists."""
    found = Path(path or ".").absolute()
    while not found.exists() and found != found.parent:
        found = found.parent
    return found


def _no_space(path: str) -> str:
    if not path:
        return "what the output goes to is full; send it to another disk"
    found = _existing_parent(path)
    usage = shutil.disk_usage(found)
    sizes = f"{size_text(usage.free)} of {size_text(usage.total)}"
    free = f"{sizes} are free on the file system of {found}"
    if usage.free > ALMOST_FULL_BYTES:
        return (
            f"{free}, so the limit is a quota (quota -s), the number of files (df -i) or the "
            "device itself; write to another disk"
        )
    return f"{free}; delete files there, raise your quota (quota -s), or write to another disk"


def _too_large(path: str) -> str:
    soft, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = "a limit of its file system"
    if soft != resource.RLIM_INFINITY:
        limit = f"{size_text(soft)}, which ulimit -f sets"
    return f"a file may be no larger than {limit}; raise it, or write to another file system"


def _device_fails(path: str) -> str:
    return "the disk or the network file system fails (dmesg may say why); use another disk"


def _too_many_files(path: str) -> str:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return (
        f"this process may have {soft} files open (hard limit {hard}); raise the limit with "
        "ulimit -n, under SLURM "
        "with srun --propagate=NOFILE, or use fewer datasets or ranks a node"
    )


def _no_permission(path: str) -> str:
    place = _existing_parent(path)
    found = place.stat()
    return (
        f"{place} belongs to user {found.st_uid} and has mode {stat.filemode(found.st_mode)}, "
        "this process runs as "
        f"{_user()}; change its mode (chmod) or give a path that you may use"
    )


def _not_there(path: str) -> str:
    link = broken_link(path)
    if link:
        return f"{link}; make the target, or the link again"
    place = _existing_parent(path)
    return f"the nearest folder that exists is {place}; check the spelling, or make the folder"


def broken_link(path: str) -> str:
    """Names the symbolic link without a target that a path leads through, and the target; "" where
    there is none."""
    for place in (Path(path), *Path(path).parents):
        if place.is_symlink() and not place.exists():
            return f"{place} is a symbolic link to {os.readlink(place)}, which does not exist"
    return ""


def _reader_ended(path: str) -> str:
    return "the program that read this output has ended (as head does); write to a file instead"


_EXPLANATIONS: dict[int | None, Callable[[str], str]] = {
    errno.ENOSPC: _no_space,
    errno.EDQUOT: _no_space,
    errno.EFBIG: _too_large,
    errno.EIO: _device_fails,
    errno.EMFILE: _too_many_files,
    errno.ENFILE: _too_many_files,
    errno.EACCES: _no_permission,
    errno.EPERM: _no_permission,
    errno.EROFS: _no_permission,
    errno.ENOENT: _not_there,
    errno.EPIPE: _reader_ended,
}


def _user() -> str:
    try:
        return f"{getpass.getuser()} ({os.getuid()})"
    except (KeyError, OSError):  # a container may run a user without a name
        return f"user {os.getuid()}"


def size_text(number: float) -> str:
    """A number of bytes as a person reads it: `1.5 GiB`."""
    return scaled(number, (" B", " KiB", " MiB", " GiB", " TiB"), step=1024)
