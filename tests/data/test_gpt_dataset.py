"""GPT samples: a permutation of windows per epoch, the same for every reader, in any order."""

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise, permutations

import numpy as np
import pytest

from megalite.data.build import blended, build_sources, data_state
from megalite.data.config import DataConfig
from megalite.data.gpt import GPTDataset, parse_split, split_documents
from megalite.data.indexed import DatasetError, IndexedDataset
from megalite.data.permutation import Permutation
from megalite.kernels.philox import counters, key_of, philox4x32
from megalite.nn.config import ModelConfig
from megalite.preprocess.indexed_writer import IndexedWriter


def permutation(n, seed=0):
    words = philox4x32(counters(0, Permutation.ROUNDS // 2), key_of(seed, "test"))
    return Permutation(n, [int(key) for key in words.reshape(-1).view("<u8")])


def dataset_of(prefix, lengths, dtype="u2"):
    """Documents of these lengths whose ids count up from 0: an id is its own position."""
    starts = np.cumsum([0, *lengths])
    with IndexedWriter(prefix, dtype) as writer:
        for start, stop in pairwise(starts):
            writer.add_document(np.arange(start, stop))
        writer.finish()
    return IndexedDataset(prefix)


SIZES = [
    *range(1, 70),
    *(2**k + d for k in (7, 8, 10, 13) for d in (-1, 0, 1)),
    97,
    7919,
    100_003,
    2 * 3 * 5 * 7 * 11 * 13,
]


@pytest.mark.parametrize("seed", [0, 1])
def test_permutation_is_a_bijection(seed):
    for n in SIZES:
        image = permutation(n, seed)(np.arange(n))
        assert np.array_equal(np.sort(image), np.arange(n, dtype=np.uint64)), n


@pytest.mark.parametrize("n", [1, 2, 3, 10, 1000, 2**31 - 1, 2**53 + 1, 2**62])
def test_permutation_of_an_int_and_of_an_array_agree(n):
    where = sorted({0, n - 1, n // 2, n // 3, min(n - 1, 2**32)})
    permute = permutation(n)
    image = permute(np.array(where))
    assert image.tolist() == [permute(i) for i in where]
    assert len(set(image.tolist())) == len(where) and all(0 <= i < n for i in image.tolist())


@pytest.mark.parametrize("n", [0, 2**62 + 1])
def test_permutation_refuses_other_sizes(n):
    with pytest.raises(ValueError, match=str(n)):
        permutation(n)


def test_permutations_are_random():
    """Every order of 4 items is about equally frequent, and neighbours do not stay neighbours."""
    draws = 2400
    orders = [tuple(permutation(4, seed)(np.arange(4)).tolist()) for seed in range(draws)]
    frequencies = np.array([orders.count(order) for order in permutations(range(4))])
    chi_squared = ((frequencies - draws / 24) ** 2 / (draws / 24)).sum()
    assert chi_squared < 58, frequencies  # 23 degrees of freedom: one in 10,000
    image = permutation(100_000)(np.arange(100_000)).astype(np.int64)
    assert (np.abs(np.diff(image)) == 1).sum() < 20  # 2 expected
    assert abs(np.corrcoef(np.arange(100_000), image)[0, 1]) < 0.016  # 5 sigma


@pytest.mark.parametrize(
    ("tokens", "s"),
    [(1000, 10), (1009, 10), (64, 32), (65, 32), (33, 32), (40, 32), (2, 1), (3, 1), (500, 1)],
)
def test_every_epoch_covers_its_windows_once(tmp_path, tokens, s):
    data = dataset_of(tmp_path / "a", [tokens // 2, tokens - tokens // 2])
    dataset = GPTDataset(data.tokens(), s, seed=1, split="train")
    per_epoch = dataset.windows_per_epoch
    assert per_epoch == max(1, (tokens - s) // s)
    offsets = set()
    for epoch in range(5):
        samples = np.stack([dataset[epoch * per_epoch + i] for i in range(per_epoch)])
        assert samples.shape == (per_epoch, s + 1) and samples.dtype == np.int64
        assert (np.diff(samples, axis=1) == 1).all()
        starts = np.sort(samples[:, 0])
        assert (np.diff(starts) == s).all() and 0 <= starts[0] < s
        offsets.add(int(starts[0]))
    assert len(offsets) > 1 or s == 1 or tokens == s + 1


def test_samples_depend_on_the_index_alone(tmp_path):
    data = dataset_of(tmp_path / "a", [300, 5, 0, 700])
    forward = [GPTDataset(data.tokens(), 16, 3, "train")[i] for i in range(200)]
    dataset = GPTDataset(data.tokens(), 16, 3, "train")
    for i in np.random.default_rng(0).permutation(200):
        np.testing.assert_array_equal(dataset[i], forward[i])


def test_threads_in_different_epochs_do_not_disturb_each_other(tmp_path):
    dataset = GPTDataset(dataset_of(tmp_path / "a", [1000]).tokens(), 16, 3, "train")
    places = [
        [epoch * dataset.windows_per_epoch + i % 50 for i in range(2000)] for epoch in range(4)
    ]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda mine: [dataset.window(i) for i in mine], places))
    alone = GPTDataset(dataset.stream, 16, 3, "train")
    assert found == [[alone.window(i) for i in mine] for mine in places]


def test_seed_split_and_epoch_change_the_order(tmp_path):
    stream = dataset_of(tmp_path / "a", [4000]).tokens()

    def order(seed, split, epoch=0):
        dataset = GPTDataset(stream, 16, seed, split)
        return tuple(dataset.window(epoch * dataset.windows_per_epoch + i) // 16 for i in range(20))

    orders = {order(1, "train"), order(2, "train"), order(1, "valid"), order(1, "train", epoch=1)}
    assert len(orders) == 4 and order(1, "train") in orders


def test_the_order_is_what_it_was(tmp_path):
    """A change of these numbers changes every run's data order: resumed runs would see other
    samples."""
    dataset = GPTDataset(dataset_of(tmp_path / "a", [1000]).tokens(), 16, 1234, "train")
    assert [dataset.window(i) for i in (0, 1, 2, 60, 61, 10**12)] == [464, 560, 32, 176, 811, 148]


def test_errors_name_split_and_numbers(tmp_path):
    stream = dataset_of(tmp_path / "a", [16]).tokens()
    with pytest.raises(
        DatasetError, match=r"split 'valid' has 16 tokens but needs at least seq-length \+ 1 = 17"
    ):
        GPTDataset(stream, 16, 0, "valid")
    with pytest.raises(IndexError, match="-1"):
        GPTDataset(stream, 8, 0, "train")[-1]


def test_ids_outside_the_vocabulary_are_refused(tmp_path):
    stream = dataset_of(tmp_path / "a", [9]).tokens()
    assert GPTDataset(stream, 8, 0, "train", vocab_size=9)[0].tolist() == list(range(9))
    with pytest.raises(
        DatasetError, match=r"split 'train'.* id 8, but the vocabulary has 8 entries"
    ):
        GPTDataset(stream, 8, 0, "train", vocab_size=8)[0]
    with IndexedWriter(tmp_path / "b", "i4") as writer:
        writer.add_document(np.array([3, -1, 2]))
        writer.finish()
    with pytest.raises(DatasetError, match="id -1"):
        GPTDataset(IndexedDataset(tmp_path / "b").tokens(), 2, 0, "train", vocab_size=8)[0]


@pytest.mark.parametrize(
    ("text", "documents", "expected"),
    [
        ("969,30,1", 1000, [(0, 969), (969, 999), (999, 1000)]),
        ("969,30,1", 249, [(0, 241), (241, 249), (249, 249)]),
        ("100,0,0", 7, [(0, 7), (7, 7), (7, 7)]),
        ("1", 7, [(0, 7), (7, 7), (7, 7)]),
        ("0.8, 0.2", 5, [(0, 4), (4, 5), (5, 5)]),
        (
            "1,1,1",
            10**18 + 1,
            [
                (0, 333333333333333334),
                (333333333333333334, 666666666666666667),
                (666666666666666667, 10**18 + 1),
            ],
        ),
        ("1,1,1", 0, [(0, 0), (0, 0), (0, 0)]),
    ],
)
def test_split_documents(text, documents, expected):
    assert list(split_documents(text, documents).items()) == list(
        zip(("train", "valid", "test"), expected, strict=True)
    )


@pytest.mark.parametrize("text", ["", "a,b", "0,0,0", "1,-1,1", "1,1,1,1", "1/0,1", "nan,1"])
def test_bad_splits_are_refused(text):
    with pytest.raises(DatasetError, match="such as 969,30,1"):
        parse_split(text)


def built(data: DataConfig, model: ModelConfig, *splits: str) -> dict:
    return {
        name: blended(its)
        for name, its in build_sources(data, model, 1, dict.fromkeys(splits, 40)).items()
    }


def test_datasets_of_a_configuration(tmp_path):
    dataset_of(tmp_path / "a", [50] * 20)
    data = DataConfig(data_path=(str(tmp_path / "a"),), split="90,10,0")
    model = ModelConfig(seq_length=16, vocab_size=1000)
    datasets = built(data, model, "train", "valid")
    assert list(datasets) == ["train", "valid"]
    seen = {
        split: {int(t) for i in range(200) for t in dataset[i]}
        for split, dataset in datasets.items()
    }
    assert max(seen["train"]) < 900 <= min(seen["valid"])
    prints = {dataset.datasets[0].stream.fingerprint() for dataset in datasets.values()}
    assert len(prints) == 2
    with pytest.raises(
        DatasetError,
        match=r"split 'test' is empty: --split 90,10,0 gives it none of the 20 documents",
    ):
        built(data, model, "train", "test")
    with pytest.raises(DatasetError, match="--data-path PREFIX, or --mock-data"):
        built(DataConfig(), model, "train")
    mock = built(DataConfig(mock_data=True), model, "train")["train"]
    assert mock[0].shape == (17,)
    with pytest.raises(DatasetError, match="needs --vocab-size"):
        built(DataConfig(mock_data=True), ModelConfig(), "train")


def test_blends_and_data_of_one_split(tmp_path):
    for name in "abc":
        dataset_of(tmp_path / name, [50] * 20)
    a, b, c = (str(tmp_path / name) for name in "abc")
    model = ModelConfig(seq_length=16, vocab_size=1000)
    blend = built(DataConfig(data_path=("3", a, "1", b), split="90,10,0"), model, "train", "valid")[
        "train"
    ]
    assert blend.consumed == [0, 0] and len(blend.datasets) == 2
    alone = built(DataConfig(data_path=(b,), split="90,10,0"), model, "train")["train"]
    assert [blend.datasets[1][i].tolist() for i in range(9)] == [
        alone[i].tolist() for i in range(9)
    ]
    own = DataConfig(train_data_path=(a,), valid_data_path=("1", b, "1", c))
    datasets = built(own, model, "train", "valid")
    assert (
        max(int(t) for i in range(200) for t in datasets["train"][i]) >= 950
    )  # every document, whatever --split says
    assert len(datasets["valid"].datasets) == 2
    state = data_state(own, model, 1, 40)
    assert [source.fingerprint for source in state.sources] == [
        datasets["train"].datasets[0].stream.fingerprint()
    ]


def test_two_sources_of_equal_contents_are_refused(tmp_path):
    """They would give the same samples in the same order, and share one count in a checkpoint."""
    for name in "ab":
        dataset_of(tmp_path / name, [50] * 20)
    blend = DataConfig(data_path=("1", str(tmp_path / "a"), "1", str(tmp_path / "b")), split="1")
    with pytest.raises(
        DatasetError,
        match="/a and .*/b have the same contents; name one, with the sum of the weights",
    ):
        data_state(blend, ModelConfig(seq_length=16, vocab_size=1000), 1, 40)
