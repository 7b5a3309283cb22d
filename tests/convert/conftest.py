"""Folders of Hugging Face."""

import pytest

from tests.convert.published_models import save_models


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """Folders that transformers wrote, by the names of MODELS."""
    pytest.importorskip("transformers")
    return save_models(tmp_path_factory.mktemp("published"))
