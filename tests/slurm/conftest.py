"""One cluster for all tests of this folder."""

import shutil
import tempfile
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster


@pytest.fixture(scope="session")
def cluster():
    folder = Path(tempfile.mkdtemp(prefix="mls-"))  # short: a socket's path has 108 bytes at most
    made = Cluster(folder)
    try:
        made.control("up")
        yield made
    finally:
        made.control("down")
        shutil.rmtree(folder, ignore_errors=True)
