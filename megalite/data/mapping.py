"""Read-only memory maps of files that hold no file descriptor."""

import ctypes
import mmap
import os
import weakref
from pathlib import Path

import numpy as np

MAP_FAILED = ctypes.c_void_p(-1).value


def map_file(path: Path) -> np.ndarray:
    """The bytes of a file as a read-only array, uint8 [size], backed by the file itself.

    Python's own mmap keeps a duplicate of the file's descriptor open as long as the map lives (an
    option of Python 3.13 turns that off), so a blend of many datasets reaches the limit of open
    files. The map does not need the descriptor: this calls mmap(2) of the C library and closes it.
    The map is removed when the last array that views it is collected.

    Raises OSError, with the file's name, when the file cannot be opened or mapped.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:  # an empty file cannot be mapped
            return np.empty(0, np.uint8)
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        arguments = (None, ctypes.c_size_t(size), mmap.PROT_READ, mmap.MAP_SHARED)
        address = libc.mmap(*arguments, file.fileno(), ctypes.c_long(0))
    if address == MAP_FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(path))
    content = (ctypes.c_ubyte * size).from_address(address)
    unmap = weakref.finalize(content, libc.munmap, ctypes.c_void_p(address), ctypes.c_size_t(size))
    unmap.atexit = False  # a thread may still read; the end of the process removes the map
    array = np.frombuffer(content, np.uint8)
    array.flags.writeable = False
    return array
