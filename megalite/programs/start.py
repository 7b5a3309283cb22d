"""Starts a program: the first thing that every command, tool and script imports.

An older Python must be able to read this file, megalite/__init__.py and the scripts that import it,
in order to say which Python is needed: no syntax newer than that of Python 2.7.
"""

import importlib
import os
import sys

OLDEST_PYTHON = (3, 10)

if sys.version_info < OLDEST_PYTHON:
    program = os.path.basename(sys.argv[0])
    needed = ".".join(map(str, OLDEST_PYTHON))
    this = "Python %s (%s)" % (sys.version.split()[0], sys.executable)
    sys.exit("%s: megalite needs Python %s or newer, this is %s" % (program, needed, this))


def start(name="main"):
    """Run the `main()` of megalite.programs.NAME and exit with the status that it returns.

    Without a name, run the command `megalite`. The limit of open files is raised as far as allowed.
    Characters that the encoding of stdout or stderr lacks are written as escapes. When the reader
    of the output has ended, as `head` does, the program ends with status 1 and without a traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    importlib.import_module("megalite.system.errors").raise_open_file_limit()
    try:
        try:
            status = importlib.import_module("megalite.programs." + name).main()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        _close_output()
        status = 1
    except OSError as error:
        if error.filename is not None or not _output_fails():
            raise
        problem = importlib.import_module("megalite.system.errors").explain_os_error(error)
        sys.stderr.write("error: the output cannot be written: %s\n" % problem)
        _close_output()
        status = 1
    sys.exit(status)


def _output_fails():
    """Whether stdout cannot be written."""
    try:
        sys.stdout.write("\n")
        sys.stdout.flush()
    except OSError:
        return True
    return False


def _close_output():
    """Let what Python flushes when it exits go nowhere: it would fail once more."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(nowhere, descriptor)
