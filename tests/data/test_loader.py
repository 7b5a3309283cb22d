"""Batches: every layout cuts the same global batch."""

import numpy as np
import pytest

from megalite.data.loader import GPTLoader, documents, first_sample
from megalite.data.mock import MockDataset


class Numbered:
    """Sample i is i, i + 1, ... i + 4."""

    def __getitem__(self, i):
        return np.arange(i, i + 5, dtype=np.int64)


def rows(dataset, micro_batch_size, data_size, consumed, global_batch):
    """A global batch by sample index, read by all data-parallel ranks."""
    found = {}
    for rank in range(data_size):
        loader = GPTLoader(dataset, micro_batch_size, data_size, rank)
        for microbatch in range(global_batch // (micro_batch_size * data_size)):
            batch = loader.batch(consumed, microbatch)
            first = first_sample(consumed, microbatch, micro_batch_size, data_size, rank)
            for j in range(micro_batch_size):
                assert first + j not in found
                found[first + j] = {key: value[j] for key, value in batch.items()}
    return found


SIZES = (1, 2, 3, 4, 6, 12)


@pytest.mark.parametrize(
    ("micro_batch_size", "data_size"),
    [(b, dp) for b in SIZES for dp in SIZES if 12 % (b * dp) == 0],
)
def test_a_global_batch_is_the_next_samples_in_any_layout(micro_batch_size, data_size):
    found = rows(Numbered(), micro_batch_size, data_size, consumed=100, global_batch=12)
    assert sorted(found) == list(range(100, 112))
    assert all(row["tokens"].tolist() == [i, i + 1, i + 2, i + 3] for i, row in found.items())
    assert all(row["labels"].tolist() == [i + 1, i + 2, i + 3, i + 4] for i, row in found.items())


def test_the_map_of_samples_to_ranks():
    assert (
        first_sample(1000, microbatch=3, micro_batch_size=4, data_size=2, data_rank=1)
        == 1000 + 3 * 8 + 4
    )


def test_types_and_masks():
    batch = GPTLoader(MockDataset(50, 16, 0, "train"), 3, 1, 0).batch(0, 0)
    assert {key: (value.dtype.name, value.shape) for key, value in batch.items()} == {
        "tokens": ("int64", (3, 16)),
        "labels": ("int64", (3, 16)),
        "loss_mask": ("float32", (3, 16)),
    }
    assert all(value.flags.c_contiguous for value in batch.values()) and batch["loss_mask"].all()
    batch = GPTLoader(Numbered(), 2, 1, 0, eod=2, eod_mask_loss=True).batch(0, 0)
    assert batch["loss_mask"].tolist() == [[1, 1, 0, 1], [1, 0, 1, 1]]


END = 9
ROWS = {
    # tokens: (positions, segments)
    (5, 6, END, 7, 8, END): ([0, 1, 2, 0, 1, 2], [0, 0, 0, 1, 1, 1]),
    (END, 5, END, END, 6, 7): ([0, 0, 1, 0, 0, 1], [0, 1, 1, 2, 3, 3]),
    (END,) * 6: ([0] * 6, [0, 1, 2, 3, 4, 5]),
    (5, 6, 7, 8, 5, 6): ([0, 1, 2, 3, 4, 5], [0] * 6),
}


def test_positions_restart_after_the_end_of_a_document():
    """The token that ends a document belongs to it; the first document of a row may have begun
    before the row."""
    positions, segments = documents(np.array(list(ROWS)), END)
    assert positions.tolist() == [row[0] for row in ROWS.values()]
    assert segments.tolist() == [row[1] for row in ROWS.values()]
    assert positions.dtype == segments.dtype == np.int64


@pytest.mark.parametrize(
    "requested", [(), ("positions",), ("segments",), ("positions", "segments")]
)
def test_requested_arrays_are_in_the_batch(requested):
    rows = np.array([(*row, 1) for row in ROWS])
    loader = GPTLoader(
        rows,
        2,
        1,
        0,
        eod=END,
        reset_position_ids="positions" in requested,
        reset_attention_mask="segments" in requested,
    )
    batch = loader.batch(0, 1)
    assert set(batch) == loader.fields == {"tokens", "labels", "loss_mask", *requested}
    for place, name in enumerate(("positions", "segments")):
        assert name not in requested or batch[name].tolist() == [
            row[place] for row in list(ROWS.values())[2:]
        ]
    assert batch["loss_mask"].all(), "nothing is masked unless that is requested"


@pytest.mark.parametrize("flag", ["eod_mask_loss", "reset_position_ids", "reset_attention_mask"])
def test_documents_without_an_end_are_refused(flag):
    with pytest.raises(ValueError, match="give eod"):
        GPTLoader(Numbered(), 1, 1, 0, **{flag: True})


@pytest.mark.parametrize(
    ("micro_batch_size", "data_size", "data_rank"), [(0, 1, 0), (1, 2, 2), (1, 2, -1)]
)
def test_impossible_ranks_are_refused(micro_batch_size, data_size, data_rank):
    with pytest.raises(ValueError, match=f"rank {data_rank} of {data_size}"):
        GPTLoader(Numbered(), micro_batch_size, data_size, data_rank)
