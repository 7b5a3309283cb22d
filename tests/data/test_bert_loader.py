"""Batches of BERT samples, and the errors of the samples."""

from dataclasses import replace

import numpy as np
import pytest

from megalite.data.indexed import DatasetError, IndexedDataset
from megalite.data.loader import BertLoader, first_sample
from megalite.preprocess.indexed_writer import IndexedWriter
from tests.data.bert_samples import CORPORA, SPECIAL, bert, dataset_of, digest

SIZES = (1, 2, 3, 4, 6, 12)


@pytest.mark.parametrize(
    ("micro_batch_size", "data_size"),
    [(b, dp) for b in SIZES for dp in SIZES if 12 % (b * dp) == 0],
)
def test_a_global_batch_is_the_next_samples_in_any_layout(tmp_path, micro_batch_size, data_size):
    dataset = bert(dataset_of(tmp_path / "a", CORPORA["articles"]), bert_pair="nsp")
    found = {}
    for rank in range(data_size):
        loader = BertLoader(dataset, micro_batch_size, data_size, rank)
        for microbatch in range(12 // (micro_batch_size * data_size)):
            batch = loader.batch(100, microbatch)
            assert set(batch) == loader.fields
            first = first_sample(100, microbatch, micro_batch_size, data_size, rank)
            for j in range(micro_batch_size):
                found[first + j] = {name: array[j] for name, array in batch.items()}
    assert sorted(found) == list(range(100, 112))
    assert all(digest([found[i]]) == digest([dataset[i]]) for i in found)


def test_shapes_of_a_batch(tmp_path):
    batch = BertLoader(bert(dataset_of(tmp_path / "a", [[9, 9]])), 3, 1, 0).batch(0, 0)
    assert {name: (array.dtype.name, array.shape) for name, array in batch.items()} == {
        **dict.fromkeys(("tokens", "token_types", "segments", "labels"), ("int64", (3, 32))),
        "loss_mask": ("float32", (3, 32)),
        "pair_label": ("int64", (3,)),
        "pair_mask": ("float32", (3,)),
    }
    assert all(array.flags.c_contiguous for array in batch.values())


@pytest.mark.parametrize(
    ("micro_batch_size", "data_size", "data_rank"), [(0, 1, 0), (1, 2, 2), (1, 2, -1)]
)
def test_impossible_ranks_are_refused(micro_batch_size, data_size, data_rank):
    with pytest.raises(ValueError, match=f"rank {data_rank} of {data_size}"):
        BertLoader(None, micro_batch_size, data_size, data_rank)


def test_errors_name_split_and_numbers(tmp_path):
    data = dataset_of(tmp_path / "a", [[3, 4], [], [0], [7]])
    with pytest.raises(
        DatasetError, match=r"--seq-length 4 has no room for two tokens .* give 5 or more"
    ):
        bert(data, 4)
    with pytest.raises(
        DatasetError, match=r"--seq-length 3 has no room for two tokens .* give 4 or more"
    ):
        bert(data, 3, bert_pair="none")
    with pytest.raises(DatasetError, match=r"split 'train' has no tokens in its 2 documents"):
        bert(data, documents=(1, 3))
    with pytest.raises(
        DatasetError, match=r"split 'valid' has 1 documents, but next-sentence prediction"
    ):
        bert(data, documents=(0, 1), split="valid", bert_pair="nsp")
    with pytest.raises(IndexError, match="-1"):
        bert(data)[-1]
    with pytest.raises(DatasetError, match="these ids must differ"):
        bert(data, special=replace(SPECIAL, pad=2))


def test_ids_outside_the_vocabulary_are_refused(tmp_path):
    data = dataset_of(tmp_path / "a", [[9]])
    assert bert(data, vocab_size=14)[0]["labels"].max() == 13
    with pytest.raises(
        DatasetError, match=r"split 'train'.* id 13, but the vocabulary has 13 entries"
    ):
        bert(data, vocab_size=13, bert_pair="none")[0]
    with IndexedWriter(tmp_path / "b", "i4") as writer:
        writer.add_document(np.array([7, -1, 8]))
        writer.finish()
    with pytest.raises(DatasetError, match="id -1"):
        bert(IndexedDataset(tmp_path / "b"), bert_pair="none")[0]
