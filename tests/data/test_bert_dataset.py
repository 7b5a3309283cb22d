"""BERT samples: every token is used, frames and masks are right, and only the index matters. Bounds
on counts are 5 standard deviations."""

import os
import struct
import subprocess
import sys
from collections import Counter
from itertools import chain
from math import sqrt
from pathlib import Path

import numpy as np
import pytest

from megalite.data.indexed import HEADER, IndexedDataset
from tests.data.bert_samples import (
    BASE,
    CORPORA,
    SPECIAL,
    V,
    bert,
    consecutive,
    dataset_of,
    digest,
    edges_of,
    near,
    positions,
    starts_of,
    text,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture(params=CORPORA)
def corpus(request, tmp_path):
    return dataset_of(tmp_path / "a", CORPORA[request.param])


@pytest.mark.parametrize("s", [5, 32])
def test_every_token_is_used_in_every_epoch(corpus, s):
    """Without pairs: every run once, and only spare slots repeat one. Runs do not overlap and leave
    no gap."""
    dataset = bert(corpus, s, bert_pair="none", short_seq_prob=0.0)
    limit = s - 2
    per_epoch = dataset.samples_per_epoch
    assert per_epoch == -(-corpus.num_tokens // limit) + 1
    for epoch in range(3):
        runs = Counter()
        for i in range(epoch * per_epoch, (epoch + 1) * per_epoch):
            tokens = positions(dataset[i])
            assert consecutive(tokens) and len(tokens) <= limit
            runs[tokens[0], tokens[-1] + 1] += 1
        ends = [stop for _, stop in sorted(runs)]
        assert [start for start, _ in sorted(runs)] == [0, *ends[:-1]] and ends[
            -1
        ] == corpus.num_tokens
        assert len(runs) == -(-corpus.num_tokens // limit)


@pytest.mark.parametrize("pair", ["sop", "nsp"])
def test_pairs_use_all_documents_and_in_time_all_tokens(corpus, pair):
    """An epoch of pairs has a sample of every run of every document; other tokens are trimmed in
    each."""
    if corpus.num_documents < 2 and pair == "nsp":
        return
    dataset = bert(corpus, 32, bert_pair=pair, short_seq_prob=0.0)
    edges = edges_of(corpus)
    assert dataset.samples_per_epoch == -(-corpus.num_tokens // 29) + len(edges) - 1
    seen = set()
    for epoch in range(40):
        used = set()
        for i in range(epoch * dataset.samples_per_epoch, (epoch + 1) * dataset.samples_per_epoch):
            parts = text(dataset[i])
            assert all(map(consecutive, parts)) and sum(map(len, parts)) <= 29
            documents = [np.searchsorted(edges, part[0], side="right") for part in parts]
            for part, document in zip(parts, documents):
                assert edges[document - 1] <= part[0] and part[-1] < edges[document]
            used.update(documents)
            seen.update(chain(*parts))
        assert len(used) == (np.diff(edges) > 0).sum()
    assert len(seen) == corpus.num_tokens


def test_runs_begin_with_a_sentence_where_they_fit(tmp_path):
    """Two runs have about 120 tokens to share, so a cut can go back to the beginning of a sentence
    of less than 8."""
    data = dataset_of(tmp_path / "a", [np.random.default_rng(1).integers(1, 8, 2000).tolist()])
    starts = starts_of(data)
    length = data.num_tokens
    dataset = bert(data, length // 40 * 2 + 40, bert_pair="none", short_seq_prob=0.0)
    found = {positions(dataset[i])[0] for i in range(3 * dataset.samples_per_epoch)}
    assert len(found) > 20 and found <= starts


def test_cuts_move_from_epoch_to_epoch(tmp_path):
    dataset = bert(dataset_of(tmp_path / "a", [[1] * 100]), 32, short_seq_prob=0.0)
    cuts = set()
    for epoch in range(10):
        first = epoch * dataset.samples_per_epoch
        cuts.add(
            tuple(
                sorted({positions(dataset[first + i])[0] for i in range(dataset.samples_per_epoch)})
            )
        )
    assert len(cuts) > 5


def test_the_frame_of_a_sample(corpus):
    for pair, s in (("sop", 32), ("nsp", 32), ("none", 12)):
        if pair == "nsp" and corpus.num_documents < 2:
            continue
        dataset = bert(corpus, s, bert_pair=pair)
        for i in range(50):
            sample = dataset[i]
            assert {name: (array.dtype.name, array.shape) for name, array in sample.items()} == {
                "tokens": ("int64", (s,)),
                "token_types": ("int64", (s,)),
                "segments": ("int64", (s,)),
                "labels": ("int64", (s,)),
                "loss_mask": ("float32", (s,)),
                "pair_label": ("int64", ()),
                "pair_mask": ("float32", ()),
            }
            parts = text(sample)
            assert sample["pair_mask"] == (len(parts) == 2) and all(parts)
            assert len(parts) == (2 if pair != "none" and len(positions(sample)) > 1 else 1)
            frame = [
                SPECIAL.cls,
                *chain(*([token + BASE for token in part] + [SPECIAL.sep] for part in parts)),
            ]
            padding = [0] * (s - len(frame))
            assert sample["labels"].tolist() == frame + padding
            assert sample["segments"].tolist() == [1] * len(frame) + padding
            second = len(parts[1]) + 1 if len(parts) == 2 else 0
            assert (
                sample["token_types"].tolist()
                == [0] * (len(frame) - second) + [1] * second + padding
            )
            masked = sample["loss_mask"] == 1
            assert (
                masked.sum()
                == sample["loss_mask"].sum()
                == max(1, round(0.15 * len(positions(sample))))
            )
            assert (sample["labels"][masked] >= BASE).all()
            assert np.array_equal(sample["tokens"][~masked], sample["labels"][~masked])


def test_samples_are_short_as_often_as_configured(tmp_path):
    """Runs have 29 tokens, all of them, and a target of 2 to 29: 28 targets, one of which shortens
    nothing."""
    data = dataset_of(tmp_path / "a", [[3, 4, 5, 6, 11] * 20])
    dataset = bert(data, short_seq_prob=0.3)
    draws = 4000
    lengths = Counter(len(positions(dataset[i])) for i in range(draws))
    assert near(draws - lengths[29], draws, 0.3 * 27 / 28)
    assert (
        all(near(lengths[n], draws, 0.3 / 28) for n in range(2, 29))
        and sum(lengths.values()) == draws
    )
    dataset = bert(data, short_seq_prob=0.0)
    assert {len(positions(dataset[i])) for i in range(100)} == {29}
    dataset = bert(dataset_of(tmp_path / "b", [[1] * 300]), 6, short_seq_prob=1.0)
    draws = 1000
    lengths = Counter(len(positions(dataset[i])) for i in range(draws))
    assert set(lengths) == {2, 3} and near(lengths[2], draws, 1 / 2), (
        "targets of 2 and 3 for runs of 3"
    )


def test_short_samples_leave_out_little_and_something_else_in_every_epoch(tmp_path):
    """A short sample of a run of L tokens leaves out 0 to L - 2, each as likely: less than L / 2 on
    average. Without a pair, which would lose what is trimmed as well."""
    data = dataset_of(tmp_path / "a", CORPORA["articles"])
    probability = 0.2
    dataset = bert(data, 32, bert_pair="none", short_seq_prob=0.2)
    seen = set()
    runs = dataset.samples_per_epoch
    for epoch in range(8):
        first = epoch * dataset.samples_per_epoch
        now = set(chain(*(positions(dataset[first + i]) for i in range(dataset.samples_per_epoch))))
        assert (
            0
            < data.num_tokens - len(now)
            < 29 * (runs * probability / 2 + 5 * sqrt(runs * probability / 3))
        )
        seen |= now
    assert len(seen) == data.num_tokens


@pytest.mark.parametrize("pair", ["sop", "nsp", "none"])
def test_samples_depend_on_the_index_alone(tmp_path, pair):
    """Neither the order in which they are asked for, nor the process, nor its hash seed."""
    data = dataset_of(tmp_path / "a", CORPORA["articles"])
    dataset = bert(data, bert_pair=pair)
    samples = [dataset[i] for i in range(200)]
    other = bert(data, bert_pair=pair)
    for i in np.random.default_rng(2).permutation(200):
        assert digest([other[i]]) == digest([samples[i]])
    script = (
        "import sys\nfrom tests.data.bert_samples import *\n"
        "dataset = bert(IndexedDataset(sys.argv[1]), bert_pair=sys.argv[2])\n"
        "print(digest([dataset[i] for i in reversed(range(200))][::-1]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7"}
    command = [sys.executable, "-c", script, str(tmp_path / "a"), pair]
    found = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert found.stdout.strip() == digest(samples)


def test_the_samples_are_what_they_were(tmp_path):
    """A change of these numbers changes every run's data: resumed runs would see other samples."""
    data = dataset_of(tmp_path / "a", [[3, 4, 5], [6], [1], [2, 30, 4]])
    dataset = bert(data, 16, seed=1234, bert_pair="nsp")
    assert dataset.samples_per_epoch == 9
    assert [dataset[i]["tokens"].tolist() for i in (0, 1, 10**12)] == [
        [2, 24, 25, 3, 4, 27, 4, 29, 30, 31, 32, 33, 34, 35, 36, 3],
        [2, 4, 6, 7, 8, 9, 10, 11, 3, 26, 4, 28, 29, 30, 31, 3],
        [2, 26, 27, 28, 3, 43, 44, 45, 4, 47, 48, 49, 50, 51, 52, 3],
    ]
    assert [int(dataset[i]["pair_label"]) for i in (0, 1, 10**12)] == [0, 1, 0]


def test_seed_split_and_epoch_change_samples(tmp_path):
    data = dataset_of(tmp_path / "a", CORPORA["articles"])
    one = bert(data)
    others = [bert(data, seed=2), bert(data, split="valid")]
    assert len({digest([dataset[i] for i in range(20)]) for dataset in [one, *others]}) == 3
    assert digest([one[i] for i in range(20)]) != digest(
        [one[i + one.samples_per_epoch] for i in range(20)]
    )


def test_masks_differ_from_epoch_to_epoch(tmp_path):
    """A single document of a run, so that every epoch has the same text: two slots, one of them
    spare."""
    dataset = bert(dataset_of(tmp_path / "a", [[20]]), bert_pair="none", short_seq_prob=0.0)
    samples = [dataset[i] for i in range(0, 100, dataset.samples_per_epoch)]
    assert all(positions(sample) == list(range(20)) for sample in samples)
    masks = {tuple(np.flatnonzero(sample["loss_mask"])) for sample in samples}
    assert len(samples) == 50 and len(masks) > 40


def test_a_split_uses_only_its_documents(tmp_path):
    data = dataset_of(tmp_path / "a", CORPORA["articles"])
    edges = edges_of(data)
    for pair in ("sop", "nsp", "none"):
        dataset = bert(data, documents=(20, 40), bert_pair=pair, short_seq_prob=0.0)
        seen = set(chain(*(positions(dataset[i]) for i in range(dataset.samples_per_epoch))))
        assert edges[20] <= min(seen) and max(seen) < edges[40]
        assert pair != "none" or seen == set(range(edges[20], edges[40]))
        assert dataset.fingerprint() != bert(data, bert_pair=pair).fingerprint()


def test_scattered_sequences_give_the_same_samples(tmp_path):
    """The sentences stored back to front: their offsets do not increase."""
    data = dataset_of(tmp_path / "a", CORPORA["articles"])
    stored = np.concatenate([data.sequence(i) for i in reversed(range(len(data)))])
    (tmp_path / "b.bin").write_bytes(stored.tobytes())
    offsets = (data.num_tokens - np.cumsum(data.lengths, dtype=np.int64)) * data.dtype.itemsize
    index = bytearray((tmp_path / "a.idx").read_bytes())
    struct.pack_into(f"<{len(data)}q", index, HEADER.size + 4 * len(data), *offsets.tolist())
    (tmp_path / "b.idx").write_bytes(index)
    scattered = IndexedDataset(tmp_path / "b")
    assert not scattered.contiguous
    for documents in ((0, 60), (7, 31)):
        samples = [
            [bert(source, documents=documents)[i] for i in range(100)]
            for source in (data, scattered)
        ]
        assert digest(samples[0]) == digest(samples[1])


def test_words_are_masked_whole(tmp_path):
    data = dataset_of(tmp_path / "a", CORPORA["articles"])
    starts_word = np.arange(V) % 2 == 0
    dataset = bert(data, starts_word=starts_word, whole_word_mask=True, max_ngrams=2)
    both = 0
    for i in range(200):
        sample = dataset[i]
        labels = sample["labels"]
        masked = sample["loss_mask"] == 1
        assert masked.any()
        if masked.sum() > 1:
            inside = (labels[1:] > BASE) & (labels[1:] % 2 == 1) & (labels[:-1] >= BASE)
            assert np.array_equal(masked[1:][inside], masked[:-1][inside])
            both += int((masked[1:] & masked[:-1])[inside].sum())
    assert both > 100
