"""BERT samples: every sentence used, pairs labelled right, the same whoever asks. Bounds on counts are 5 standard
deviations.

The tokens of the test data count up from 5: a token tells its own place.
"""

import hashlib
import os
import struct
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import chain, pairwise
from math import sqrt
from pathlib import Path

import numpy as np
import pytest

from megalite.data.bert import BertDataset, BertLoader
from megalite.data.bert_config import BertDataConfig
from megalite.data.indexed import HEADER, DatasetError, IndexedDataset
from megalite.data.masking import SpecialIds
from megalite.data.sampler import first_sample
from megalite.preprocess.indexed_writer import IndexedWriter

ROOT = Path(__file__).parents[2]
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


def bert(data, s=32, seed=1, split="train", documents=None, **config):
    documents = documents or (0, data.num_documents)
    return BertDataset(data, documents, s, seed, split, SPECIAL, V, config=BertDataConfig(**config))


def text(sample):
    """The segments of a sample before masking, as lists of places in the data."""
    labels = sample["labels"][sample["segments"] == 1]
    ends = np.flatnonzero(labels == SPECIAL.sep)
    parts = np.split(labels, ends + 1)[:-1]
    parts[0] = parts[0][1:]
    return [(part[:-1] - BASE).tolist() for part in parts]


def places(sample):
    """All of its text, in increasing order."""
    return sorted(chain(*text(sample)))


def consecutive(tokens):
    return tokens == list(range(tokens[0], tokens[0] + len(tokens)))


def near(count, draws, probability):
    return abs(count - draws * probability) <= 5 * sqrt(draws * probability * (1 - probability))


def edges_of(data):
    """Place at which each document begins, and the end."""
    starts = np.concatenate([[0], np.cumsum(data.lengths)])
    return starts[data.document_indices]


random = np.random.default_rng(0)
CORPORA = {
    "articles": [random.integers(1, 12, random.integers(1, 14)).tolist() for _ in range(60)],
    "one sentence each": [[int(n)] for n in random.integers(1, 30, 80)],
    "long sentences": [[200], [5, 300, 5], [30], [29, 29], [1000]],
    "one long document": [random.integers(1, 20, 150).tolist()],
    "empty documents": [[], [4, 0, 3], [], [], [0], [0, 0, 50, 0, 7, 0], [2], []],
    "single tokens": [[1], [1], [1, 1], [1], [2]],
    "one token": [[1]],
    "runs that fit exactly": [[29], [29, 29], [29] * 7, [58]],
}


@pytest.fixture(params=CORPORA)
def corpus(request, tmp_path):
    return dataset_of(tmp_path / "a", CORPORA[request.param])


@pytest.mark.parametrize("s", [5, 32])
def test_every_token_is_used_in_every_epoch(corpus, s):
    """Without pairs: every run once, and only spare slots repeat one. Runs do not overlap and leave no gap."""
    dataset = bert(corpus, s, bert_pair="none", short_seq_prob=0.0)
    limit, per_epoch = s - 2, dataset.samples_per_epoch
    assert per_epoch == -(-corpus.num_tokens // limit) + 1
    for epoch in range(3):
        runs = Counter()
        for i in range(epoch * per_epoch, (epoch + 1) * per_epoch):
            tokens = places(dataset[i])
            assert consecutive(tokens) and len(tokens) <= limit
            runs[tokens[0], tokens[-1] + 1] += 1
        ends = [stop for _, stop in sorted(runs)]
        assert [start for start, _ in sorted(runs)] == [0, *ends[:-1]] and ends[
            -1
        ] == corpus.num_tokens
        assert len(runs) == -(-corpus.num_tokens // limit)


@pytest.mark.parametrize("pair", ["sop", "nsp"])
def test_pairs_use_all_documents_and_in_time_all_tokens(corpus, pair):
    """An epoch of pairs has a sample of every run of every document; other tokens are trimmed in each."""
    if corpus.num_documents < 2 and pair == "nsp":
        return
    dataset, edges = bert(corpus, 32, bert_pair=pair, short_seq_prob=0.0), edges_of(corpus)
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
    """Two runs have about 120 tokens to share, so a cut can go back to the beginning of a sentence of less than 8."""
    data = dataset_of(tmp_path / "a", [random.integers(1, 8, 2000).tolist()])
    starts = set(np.concatenate([[0], np.cumsum(data.lengths)]).tolist())
    length = data.num_tokens
    dataset = bert(data, length // 40 * 2 + 40, bert_pair="none", short_seq_prob=0.0)
    found = {places(dataset[i])[0] for i in range(3 * dataset.samples_per_epoch)}
    assert len(found) > 20 and found <= starts


def parts_of_pairs(dataset, count):
    """(segments, label) of the first samples that are pairs."""
    for i in range(count):
        sample = dataset[i]
        if sample["pair_mask"]:
            yield text(sample), int(sample["pair_label"])


@pytest.mark.parametrize("s", [24, 200])
def test_segments_are_whole_sentences_until_they_are_trimmed(tmp_path, s):
    """What is not full ends at sentence borders everywhere; what is full was trimmed by a sentence or two at most."""
    data = dataset_of(tmp_path / "a", CORPORA["articles"])
    starts, edges = set(np.cumsum([0, *data.lengths]).tolist()), set(edges_of(data).tolist())
    full = 0
    for (a, b), label in parts_of_pairs(bert(data, s, short_seq_prob=0.0), 800):
        a, b = (b, a) if label else (a, b)
        if len(a) + len(b) < s - 3:  # the document has no more
            one_sentence = not starts & set(range(a[0] + 1, b[-1] + 1))
            assert (
                b[0] == a[-1] + 1
                and {a[0], b[-1] + 1} <= starts
                and (b[0] in starts or one_sentence)
            )
            assert a[0] in edges or b[-1] + 1 in edges
        else:
            full += 1
            assert 0 < b[0] - a[-1] <= 2 * max(data.lengths)
    assert full > 600 if s == 24 else full == 0


LEAKS = {
    "long": [random.integers(1, 40, 300).tolist() for _ in range(20)],
    "short": [random.integers(1, 40, n).tolist() for n in random.integers(2, 12, 300)],
}


def outward(parts, starts, room: int):
    """What can be seen of a pair without reading it: which of its ends are sentence borders, how full it is, and which
    of its segments is longer."""
    (a, b), sizes = parts, [len(part) for part in parts]
    ends = (a[0] in starts, a[-1] + 1 in starts, b[0] in starts, b[-1] + 1 in starts)
    return {
        **dict(enumerate(ends)),
        "full": sum(sizes) == room,
        "longer": int(np.sign(sizes[0] - sizes[1])),
        "all": ends,
    }


@pytest.mark.parametrize("pair", ["sop", "nsp"])
@pytest.mark.parametrize("s", [64, 256])
@pytest.mark.parametrize("kind", LEAKS)
def test_how_a_pair_looks_does_not_tell_its_label(tmp_path, kind, s, pair):
    """The best guess from each look, learned on one half of the samples, is right for half of the others. (Labels of
    next sentences come in pairs: twice the variance.)"""
    data = dataset_of(tmp_path / "a", LEAKS[kind])
    starts = set(np.cumsum([0, *data.lengths]).tolist())
    seen = [
        (outward(parts, starts, s - 3), label)
        for parts, label in parts_of_pairs(bert(data, s, bert_pair=pair), 4000)
    ]
    half = len(seen) // 2
    for look in seen[0][0]:
        counts = Counter((looks[look], label) for looks, label in seen[:half])
        right = sum(
            (counts[looks[look], 1] > counts[looks[look], 0]) == label
            for looks, label in seen[half:]
        )
        assert abs(right / half - 0.5) < 5 * sqrt((2 if pair == "nsp" else 1) * 0.25 / half), look


def test_cuts_move_from_epoch_to_epoch(tmp_path):
    dataset = bert(dataset_of(tmp_path / "a", [[1] * 100]), 32, short_seq_prob=0.0)
    cuts = set()
    for epoch in range(10):
        first = epoch * dataset.samples_per_epoch
        cuts.add(
            tuple(sorted({places(dataset[first + i])[0] for i in range(dataset.samples_per_epoch)}))
        )
    assert len(cuts) > 5


def test_the_border_is_anywhere_in_the_sample(tmp_path):
    data = dataset_of(tmp_path / "a", CORPORA["articles"])
    shares = Counter()
    for (a, b), label in parts_of_pairs(bert(data, 200, short_seq_prob=0.0), 1000):
        a, b = (b, a) if label else (a, b)
        shares[round(3 * len(a) / (len(a) + len(b)))] += 1
    assert set(shares) == {0, 1, 2, 3}


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
            assert len(parts) == (2 if pair != "none" and len(places(sample)) > 1 else 1)
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
                == max(1, round(0.15 * len(places(sample))))
            )
            assert (sample["labels"][masked] >= BASE).all()
            assert np.array_equal(sample["tokens"][~masked], sample["labels"][~masked])


def test_half_of_the_orders_are_swapped(tmp_path):
    dataset = bert(dataset_of(tmp_path / "a", CORPORA["articles"]))
    labels, draws = 0, 2000
    for i in range(draws):
        sample = dataset[i]
        if sample["pair_mask"] == 0:
            draws -= 1
            continue
        a, b = text(sample)
        assert (b[-1] < a[0]) if sample["pair_label"] else (a[-1] < b[0])
        labels += int(sample["pair_label"])
    assert draws > 1900 and near(labels, draws, 0.5)


def test_half_of_the_next_sentences_are_of_another_document(tmp_path):
    """Labels come in pairs, half an epoch apart, so their number has twice the variance of independent ones; partners
    of one document (every 60th) are not exchanged."""
    data = dataset_of(tmp_path / "a", [[5] * 12] * 60)
    dataset, edges = bert(data, 63, bert_pair="nsp"), edges_of(data)
    per_epoch = dataset.samples_per_epoch
    labels, seconds, epochs = 0, Counter(), 20
    for i in range(epochs * per_epoch):
        sample = dataset[i]
        a, b = text(sample)
        documents = [np.searchsorted(edges, part[0], side="right") for part in (a, b)]
        assert (
            consecutive(a)
            and consecutive(b)
            and (documents[0] != documents[1]) == bool(sample["pair_label"])
        )
        assert sample["pair_label"] or a[-1] < b[0]
        labels += int(sample["pair_label"])
        seconds[int(documents[1])] += int(sample["pair_label"])
    draws = epochs * per_epoch
    assert abs(labels - draws * 0.5 * 59 / 60) <= 5 * sqrt(2 * draws * 0.5 * 0.5)
    mean = labels / 60
    assert (
        all(abs(count - mean) <= 5 * sqrt(mean) for count in seconds.values())
        and len(seconds) == 60
    )


def test_parts_too_long_together_are_trimmed_to_fit(tmp_path):
    """Both documents are cut near their middle at their one border, so an exchange makes a pair of 9 + 9 tokens and one
    of 20 + 20, which must become 15 + 14."""
    data = dataset_of(tmp_path / "a", [[20, 9], [9, 20]] * 30)
    dataset = bert(data, bert_pair="nsp", short_seq_prob=0.0)
    trimmed = Counter()
    for i in range(2000):
        sample = dataset[i]
        a, b = text(sample)
        assert len(a) + len(b) <= 29 and consecutive(a) and consecutive(b)
        if sample["pair_label"] and (len(a), len(b)) == (15, 14):
            trimmed[a[0] % 29, b[0] % 29] += 1
    assert len({start for start, _ in trimmed}) == 6, (
        "A, the first 20 tokens of a document, begins at 0 to 5"
    )
    assert len({start for _, start in trimmed}) == 7, "B, the last 20 tokens, begins at 9 to 15"


def test_samples_are_short_as_often_as_asked(tmp_path):
    """Runs have 29 tokens, all of them, and a target of 2 to 29: 28 targets, one of which shortens nothing."""
    data = dataset_of(tmp_path / "a", [[3, 4, 5, 6, 11] * 20])
    dataset, draws = bert(data, short_seq_prob=0.3), 4000
    lengths = Counter(len(places(dataset[i])) for i in range(draws))
    assert near(draws - lengths[29], draws, 0.3 * 27 / 28)
    assert (
        all(near(lengths[n], draws, 0.3 / 28) for n in range(2, 29))
        and sum(lengths.values()) == draws
    )
    dataset = bert(data, short_seq_prob=0.0)
    assert {len(places(dataset[i])) for i in range(100)} == {29}
    dataset, draws = bert(dataset_of(tmp_path / "b", [[1] * 300]), 6, short_seq_prob=1.0), 1000
    lengths = Counter(len(places(dataset[i])) for i in range(draws))
    assert set(lengths) == {2, 3} and near(lengths[2], draws, 1 / 2), (
        "targets of 2 and 3 for runs of 3"
    )


def test_short_samples_leave_out_little_and_something_else_in_every_epoch(tmp_path):
    """A short sample of a run of L tokens leaves out 0 to L - 2, each as likely: less than L / 2 on average. Without a
    pair, which would lose what is trimmed as well."""
    data = dataset_of(tmp_path / "a", CORPORA["articles"])
    probability, dataset = 0.2, bert(data, 32, bert_pair="none", short_seq_prob=0.2)
    seen, runs = set(), dataset.samples_per_epoch
    for epoch in range(8):
        first = epoch * dataset.samples_per_epoch
        now = set(chain(*(places(dataset[first + i]) for i in range(dataset.samples_per_epoch))))
        assert (
            0
            < data.num_tokens - len(now)
            < 29 * (runs * probability / 2 + 5 * sqrt(runs * probability / 3))
        )
        seen |= now
    assert len(seen) == data.num_tokens


def digest(samples):
    content = hashlib.sha256()
    for sample in samples:
        for name in sorted(sample):
            content.update(sample[name].tobytes())
    return content.hexdigest()


@pytest.mark.parametrize("pair", ["sop", "nsp", "none"])
def test_samples_depend_on_the_index_alone(tmp_path, pair):
    """Neither the order in which they are asked for, nor the process, nor its hash seed."""
    data = dataset_of(tmp_path / "a", CORPORA["articles"])
    dataset = bert(data, bert_pair=pair)
    samples = [dataset[i] for i in range(200)]
    other = bert(data, bert_pair=pair)
    for i in random.permutation(200):
        assert digest([other[i]]) == digest([samples[i]])
    script = (
        "import sys\nfrom tests.data.test_bert_dataset import *\n"
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
    """A single document of a run, so that every epoch has the same text: two slots, one of them spare."""
    dataset = bert(dataset_of(tmp_path / "a", [[20]]), bert_pair="none", short_seq_prob=0.0)
    samples = [dataset[i] for i in range(0, 100, dataset.samples_per_epoch)]
    assert all(places(sample) == list(range(20)) for sample in samples)
    masks = {tuple(np.flatnonzero(sample["loss_mask"])) for sample in samples}
    assert len(samples) == 50 and len(masks) > 40


def test_a_split_uses_its_documents_alone(tmp_path):
    data = dataset_of(tmp_path / "a", CORPORA["articles"])
    edges = edges_of(data)
    for pair in ("sop", "nsp", "none"):
        dataset = bert(data, documents=(20, 40), bert_pair=pair, short_seq_prob=0.0)
        seen = set(chain(*(places(dataset[i]) for i in range(dataset.samples_per_epoch))))
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
    config = BertDataConfig(whole_word_mask=True, max_ngrams=2)
    starts_word = np.arange(V) % 2 == 0
    dataset = BertDataset(data, (0, 60), 32, 1, "train", SPECIAL, V, starts_word, config)
    both = 0
    for i in range(200):
        sample = dataset[i]
        labels, masked = sample["labels"], sample["loss_mask"] == 1
        assert masked.any()
        if masked.sum() > 1:
            inside = (labels[1:] > BASE) & (labels[1:] % 2 == 1) & (labels[:-1] >= BASE)
            assert np.array_equal(masked[1:][inside], masked[:-1][inside])
            both += int((masked[1:] & masked[:-1])[inside].sum())
    assert both > 100


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
        BertDataset(data, (0, 4), 32, 1, "train", replace(SPECIAL, pad=2), V)


def test_ids_outside_the_vocabulary_are_refused(tmp_path):
    data = dataset_of(tmp_path / "a", [[9]])
    assert BertDataset(data, (0, 1), 32, 1, "train", SPECIAL, 14)[0]["labels"].max() == 13
    with pytest.raises(
        DatasetError, match=r"split 'train'.* id 13, but the vocabulary has 13 entries"
    ):
        BertDataset(
            data, (0, 1), 32, 1, "train", SPECIAL, 13, config=BertDataConfig(bert_pair="none")
        )[0]
    with IndexedWriter(tmp_path / "b", "i4") as writer:
        writer.add_document(np.array([7, -1, 8]))
        writer.finish()
    with pytest.raises(DatasetError, match="id -1"):
        bert(IndexedDataset(tmp_path / "b"), bert_pair="none")[0]
