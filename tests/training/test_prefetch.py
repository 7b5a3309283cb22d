"""Samples are read ahead, on another thread, and come out as if they were not."""

import subprocess
import sys
import threading

import pytest

from megalite.training.prefetch import Prefetcher


class Reader:
    """Remembers what was read, and where."""

    def __init__(self):
        self.read = []

    def __call__(self, consumed: int) -> int:
        self.read.append((consumed, threading.current_thread() is threading.main_thread()))
        if consumed == 13:
            raise ValueError("unlucky")
        return 10 * consumed


def test_the_next_samples_are_read_ahead():
    reader = Reader()
    prefetcher = Prefetcher(reader)
    assert [prefetcher.get(0, 1), prefetcher.get(1, 2), prefetcher.get(2, None)] == [0, 10, 20]
    prefetcher.close()
    assert reader.read == [(0, True), (1, False), (2, False)]


def test_a_wrong_guess_changes_nothing():
    reader = Reader()
    prefetcher = Prefetcher(reader)
    assert [prefetcher.get(0, 1), prefetcher.get(5, 6), prefetcher.get(6, None)] == [0, 50, 60]
    prefetcher.close()
    assert (5, True) in reader.read and (6, False) in reader.read


def test_an_error_is_raised_where_its_samples_are_wanted():
    prefetcher = Prefetcher(Reader())
    assert prefetcher.get(12, 13) == 120
    with pytest.raises(ValueError, match="unlucky"):
        prefetcher.get(13, 14)
    assert prefetcher.get(14, 13) == 140
    prefetcher.close()  # what is read beyond the end of a run is nobody's error


def test_a_disk_that_hangs_does_not_keep_the_process():
    """A read that never ends is left behind, by `close` and by the end of the process."""
    code = """
import threading
from megalite.training import prefetch
prefetch.CLOSE_SECONDS = 0.1
prefetcher = prefetch.Prefetcher(lambda consumed: consumed and threading.Event().wait())
prefetcher.get(0, 1)
prefetcher.close()
print("closed")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "closed\n"), done
