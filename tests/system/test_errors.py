"""Errors of the operating system, met for real: the message names file, limit and remedy."""

import errno
import os
import shutil
import subprocess
import sys
from collections import namedtuple

import pytest

from megalite.system.errors import explain_os_error

RUN = """
import os, resource, sys
from megalite.system.errors import explain_os_error, raise_open_file_limit
resource.setrlimit(resource.RLIMIT_NOFILE, (20, 40))
kept = []
def fill():
    try:
        while True:
            kept.append(open(sys.argv[1]))
    except OSError as error:
        print(len(kept), explain_os_error(error))
fill()
print(raise_open_file_limit())
fill()
"""


def met(action) -> str:
    with pytest.raises(OSError) as caught:
        action()
    return explain_os_error(caught.value)


def test_a_full_disk_names_file_and_free_space():
    with open("/dev/full", "w") as file:

        def write():
            try:
                os.write(file.fileno(), b"x")
            except OSError as error:
                raise OSError(error.errno, error.strerror, file.name) from None

        text = met(write)
    assert text.startswith("/dev/full: No space left on device: ") and "are free on" in text
    assert "the device itself; write to another disk" in text  # its file system has space


def test_a_disk_without_space_asks_for_less(monkeypatch, tmp_path):
    error = OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "file"))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(8 << 30, 8 << 30, 4096))
    assert f"4 KiB of 8 GiB are free on the file system of {tmp_path}; delete files there" in (
        explain_os_error(error)
    )


def test_too_many_open_files_name_the_limit_which_can_be_raised(tmp_path):
    file = tmp_path / "data"
    file.touch()
    done = subprocess.run(
        [sys.executable, "-c", RUN, file], capture_output=True, text=True, check=True
    )
    first, limit, second = done.stdout.splitlines()
    assert "may have 20 files open (hard limit 40); raise the limit with ulimit -n" in first
    assert limit == "40" and "may have 40 files open" in second
    assert int(second.split()[0]) - int(first.split()[0]) == 20


def test_a_missing_folder_names_the_nearest_that_exists(tmp_path):
    wanted = tmp_path / "no" / "such" / "file"
    text = met(lambda: open(wanted))
    assert text == (
        f"{wanted}: No such file or directory: the nearest folder that exists is {tmp_path}; "
        "check the spelling, "
        "or make the folder"
    )


@pytest.mark.parametrize("name", ["link", "folder/file"])
def test_a_link_without_a_target_names_the_target(tmp_path, name):
    place = tmp_path / name.partition("/")[0]
    place.symlink_to("/gone/data")
    text = met(lambda: open(tmp_path / name))
    assert f"{place} is a symbolic link to /gone/data, which does not exist; make the" in text


def test_a_refused_path_names_owner_mode_and_user(tmp_path):
    """An error as the system words it; root is refused nothing, so it is made by hand."""
    text = explain_os_error(PermissionError(13, "Permission denied", str(tmp_path / "secret")))
    assert f"{tmp_path} belongs to user {os.getuid()} and has mode drwx" in text
    assert f"({os.getuid()}); change its mode" in text


def test_a_reader_that_ended_is_named():
    reader, writer = os.pipe()
    os.close(reader)
    try:
        assert "the program that read this output has ended" in met(lambda: os.write(writer, b"x"))
    finally:
        os.close(writer)


def test_other_errors_stay_as_they_are():
    error = OSError(110, "Connection timed out")
    assert explain_os_error(error) == str(error)
