import multiprocessing

import pytest

from tests.pool import PRELOAD


@pytest.fixture
def forkserver():
    """Starts processes that have torch loaded."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context
