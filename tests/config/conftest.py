"""Folders with data and tokenizers."""

import pytest

from megalite.data.indexed import DatasetInfo
from megalite.data.tokenizers import build_tokenizer
from tests.config.validation import write_dataset
from tests.data.tokenizer_files import make_files


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a dataset `corpus` of 20 documents of 100 bytes, and `longer` of 200, in which
    the test runs."""
    monkeypatch.chdir(tmp_path)
    for name, documents in (("corpus", 20), ("longer", 200)):
        sha256, tokens = build_tokenizer("ByteTokenizer").sha256, 100 * documents
        write_dataset(
            name, documents, DatasetInfo("ByteTokenizer", 257, 256, sha256, documents, tokens)
        )
    return tmp_path


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """A folder with the files of every kind of tokenizer."""
    folder = tmp_path_factory.mktemp("tokenizers")
    return folder, make_files(folder)
