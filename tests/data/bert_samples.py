"""What the tests of BERT samples share: corpora whose tokens count up from 5, so that a token is
its own position in the data, and functions that read samples of them."""

import hashlib
from itertools import chain, pairwise
from math import sqrt

import numpy as np

from megalite.data.bert import BertDataset
from megalite.data.bert_config import BertDataConfig
from megalite.data.indexed import IndexedDataset
from megalite.data.masking import Masker, SpecialIds
from megalite.preprocess.indexed_writer import IndexedWriter

SPECIAL = SpecialIds(cls=2, sep=3, mask=4, pad=0)
BASE = 5
V = 10**6


def dataset_of(prefix, documents):
    """Documents of sentences of these lengths."""
    token = BASE
    with IndexedWriter(prefix, "i4") as writer:
        for lengths in documents:
            bounds = token + np.cumsum([0, *lengths])
            writer.add_document(*[np.arange(a, b) for a, b in pairwise(bounds)])
            token = int(bounds[-1])
        writer.finish()
    return IndexedDataset(prefix)


def bert(
    data,
    s=32,
    seed=1,
    split="train",
    *,
    documents=None,
    special=SPECIAL,
    vocab_size=V,
    starts_word=None,
    **config,
):
    documents = documents or (0, data.num_documents)
    masker = Masker(special, vocab_size, starts_word, BertDataConfig(**config))
    return BertDataset(data, documents, s, masker, seed=seed, split=split)


def text(sample):
    """The segments of a sample before masking, as lists of positions in the data."""
    labels = sample["labels"][sample["segments"] == 1]
    ends = np.flatnonzero(labels == SPECIAL.sep)
    parts = np.split(labels, ends + 1)[:-1]
    parts[0] = parts[0][1:]
    return [(part[:-1] - BASE).tolist() for part in parts]


def positions(sample):
    """Positions in the data of all tokens of a sample, in increasing order."""
    return sorted(chain(*text(sample)))


def consecutive(tokens):
    return tokens == list(range(tokens[0], tokens[0] + len(tokens)))


def near(count, draws, probability):
    """Whether a count is within 5 standard deviations of its expectation."""
    return abs(count - draws * probability) <= 5 * sqrt(draws * probability * (1 - probability))


def starts_of(data):
    """Position of the first token of each sentence, and the end."""
    return set(np.cumsum([0, *data.lengths]).tolist())


def edges_of(data):
    """Position of the first token of each document, and the end."""
    starts = np.concatenate([[0], np.cumsum(data.lengths)])
    return starts[data.document_indices]


def digest(samples):
    content = hashlib.sha256()
    for sample in samples:
        for name in sorted(sample):
            content.update(sample[name].tobytes())
    return content.hexdigest()


_random = np.random.default_rng(0)
CORPORA = {
    "articles": [_random.integers(1, 12, _random.integers(1, 14)).tolist() for _ in range(60)],
    "one sentence each": [[int(n)] for n in _random.integers(1, 30, 80)],
    "long sentences": [[200], [5, 300, 5], [30], [29, 29], [1000]],
    "one long document": [_random.integers(1, 20, 150).tolist()],
    "empty documents": [[], [4, 0, 3], [], [], [0], [0, 0, 50, 0, 7, 0], [2], []],
    "single tokens": [[1], [1], [1, 1], [1], [2]],
    "one token": [[1]],
    "runs that fit exactly": [[29], [29, 29], [29] * 7, [58]],
}
