"""--sample-order megatron gives Megatron-core's samples; our files are its files, byte for byte.

Where megatron-core is installed, or MEGATRON_PYTHON names a Python that has it, everything is
compared with it; always with digests that were recorded when it was equal.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from megalite.data.build import build_sources, data_state
from megalite.data.config import DataConfig
from megalite.data.gpt import SplitData
from megalite.data.indexed import DatasetError, IndexedDataset
from megalite.data.megatron_order import MegatronOrderDataset, split_sequences
from megalite.nn.config import ModelConfig
from megalite.preprocess.indexed_writer import IndexedWriter
from tests.data.megatron_samples import DOCUMENTS, digest

FIND = "import importlib.util, sys; sys.exit(importlib.util.find_spec('megatron') is None)"
SCRIPT = Path(__file__).parent / "megatron_samples.py"
CASES = [
    dict(seed=1234, seq_length=16, samples=[300, 12, 2], split="900,60,40"),
    dict(seed=1, seq_length=16, samples=[624, 4, 0], split="99,1,0"),
    dict(seed=7, seq_length=64, samples=[203, 40, 10], split="80,15,5"),
    dict(seed=7, seq_length=64, samples=[290, 80, 20], split="80,15,5"),
    dict(seed=42, seq_length=512, samples=[60, 0, 0], split="1"),
    dict(seed=3, seq_length=9, samples=[9000, 100, 100], split="0.5,0.25,0.25"),
    dict(seed=11, seq_length=16, samples=[900, 70, 0], split=None),
]
"""About half an epoch, just under and over one, 1.3, 1.9 and 10 epochs, and more; the last: data of
one split."""
RECORDED = [
    ["8c67e637d6ec0d91", "d1013fe60cdc7b88", "9f4b8b16cb6df0a8"],
    ["125ac0e44997539d", "76ef3c1720b4a53d", "e3b0c44298fc1c14"],
    ["a0cc43e56a9c807d", "2e889920e4d5d078", "5c362785960f64d5"],
    ["001330e807d165dc", "2027662fe27b6481", "447a17a467b73d34"],
    ["56577c40e7ce2b22", "e3b0c44298fc1c14", "e3b0c44298fc1c14"],
    ["c64cf1de0e457d0c", "2b02d14b41ffb7ca", "06d034ab100b5147"],
    ["62ac9cc312521b3e", "becee61625d0329f", "e3b0c44298fc1c14"],
]


@pytest.fixture(scope="module")
def prefix(tmp_path_factory) -> str:
    """10,000 tokens in sequences of 0 to 120."""
    path = str(tmp_path_factory.mktemp("megatron") / "data")
    random = np.random.default_rng(5)
    with IndexedWriter(path, np.uint16) as writer:
        while writer.tokens < 10_000:
            sequences_of_document = [
                random.integers(0, 50000, random.integers(0, 120))
                for _ in range(random.integers(1, 3))
            ]
            writer.add_document(*sequences_of_document)
        writer.finish()
    return path


def ours(prefix: str, case: dict) -> list[str]:
    paths = (
        {"data_path": (prefix,)}
        if case["split"]
        else {"train_data_path": (prefix,), "valid_data_path": (prefix,)}
    )
    data = DataConfig(**paths, split=case["split"] or "969,30,1", sample_order="megatron")
    counts = {
        name: count for name, count in zip(("train", "valid", "test"), case["samples"]) if count
    }
    built = build_sources(
        data, ModelConfig(seq_length=case["seq_length"], vocab_size=50257), case["seed"], counts
    )
    datasets = {name: dataset for name, ((_, dataset),) in built.items()}
    found = {
        name: digest(dataset[i] for i in range(counts[name])) for name, dataset in datasets.items()
    }
    return [found.get(name, digest([])) for name in ("train", "valid", "test")]


def megatron(*words: str, stdin: str = "") -> str:
    """What the script prints in a Python that has megatron-core. Skips where there is none."""
    python = os.environ.get("MEGATRON_PYTHON", sys.executable)
    if subprocess.run([python, "-c", FIND], capture_output=True).returncode:
        pytest.skip(
            "megatron-core is not installed, and MEGATRON_PYTHON names no Python that has it"
        )
    done = subprocess.run(
        [python, SCRIPT, *words], input=stdin, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""


def test_samples_are_those_recorded_and_no_file_is_made(prefix):
    """No cache: nothing that another rank could have to wait for."""
    before = sorted(Path(prefix).parent.iterdir())
    assert [ours(prefix, case) for case in CASES] == RECORDED
    assert sorted(Path(prefix).parent.iterdir()) == before


def test_samples_are_megatrons(prefix, tmp_path):
    cases = [{**case, "prefix": prefix, "cache": str(tmp_path)} for case in CASES]
    assert [ours(prefix, case) for case in CASES] == json.loads(megatron(stdin=json.dumps(cases)))


def test_files_are_megatrons_to_the_byte(tmp_path):
    with IndexedWriter(tmp_path / "ours", np.uint16) as writer:
        for document in DOCUMENTS:
            writer.add_document(*map(np.array, document))
        writer.finish()
    megatron("write", str(tmp_path / "theirs"))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (
            tmp_path / f"theirs{suffix}"
        ).read_bytes()
    sequences, boundaries = json.loads(megatron("read", str(tmp_path / "ours")))
    dataset = IndexedDataset(tmp_path / "theirs")
    assert (
        [dataset.sequence(i).tolist() for i in range(len(dataset))]
        == sequences
        == [*chain(*DOCUMENTS)]
    )
    assert dataset.document_indices.tolist() == boundaries


def test_every_token_is_seen_once_an_epoch(tmp_path):
    """Each token has an id of its own, so that one which comes again is noticed."""
    s = 16
    tokens = 10_000
    with IndexedWriter(tmp_path / "data", np.uint16) as writer:
        for part in np.split(np.arange(tokens), range(37, tokens, 37)):
            writer.add_document(part)
        writer.finish()
    epoch = (tokens - 1) // s
    part = SplitData(IndexedDataset(tmp_path / "data"), "train", "1")
    dataset = MegatronOrderDataset(part, s, seed=1, num_samples=epoch)
    assert len(dataset) == epoch
    seen = np.concatenate([dataset[i][:-1] for i in range(epoch)])
    assert len(seen) == epoch * s > tokens - 1 - s
    assert len(np.unique(seen)) == len(seen)


def test_unsupported_splits_seeds_and_samples_are_refused(prefix):
    indexed = IndexedDataset(prefix)
    with pytest.raises(DatasetError, match="split 'test' has .* tokens but needs at least"):
        MegatronOrderDataset(SplitData(indexed, "test", "969,30,1"), 512, seed=1, num_samples=5)
    train = SplitData(indexed, "train", "1")
    dataset = MegatronOrderDataset(train, 16, seed=1, num_samples=5, vocab_size=100)
    with pytest.raises(DatasetError, match="the vocabulary has 100 entries"):
        dataset[0]
    with pytest.raises(IndexError, match="has 62"):
        dataset[len(dataset)]
    with pytest.raises(DatasetError, match="--seed below 2.32"):
        MegatronOrderDataset(train, 16, seed=2**32, num_samples=5)
    for text in ("1e3,1", "1/2,1/2"):  # Megatron-core reads the numbers 1, 3, 1 and 1, 2, 1, 2
        with pytest.raises(DatasetError, match="plain numbers"):
            split_sequences(text, 5)
    assert split_sequences("1,1", 5) == {"train": (0, 2), "valid": (2, 5), "test": (5, 5)}


def test_a_checkpoint_knows_how_many_epochs_its_order_was_made_for(prefix):
    """Another number of samples is another order, unless it is one of the same epochs; the counted
    order has one."""
    s = 16

    def state(samples: int, order: str = "megatron"):
        data = DataConfig(data_path=(prefix,), split="1", sample_order=order)
        return data_state(data, ModelConfig(seq_length=s, vocab_size=50257), 1, samples)

    epoch = (IndexedDataset(prefix).num_tokens - 1) // s
    assert state(epoch // 2).differences(state(epoch)) == []
    assert state(epoch).differences(state(epoch * 3)) == ["epochs 1 -> 3"]
    assert state(2 * epoch).differences(state(epoch + epoch // 2)) == [
        "last-epoch-apart False -> True"
    ]
    assert state(5, "counted").differences(state(5000, "counted")) == []
    assert state(5, "counted").order == {"seed": 1, "seq_length": s, "sample_order": "counted"}
    unrecorded = replace(state(5), order=state(5).order | {})
    for key in ("epochs", "last_epoch_apart"):
        del unrecorded.order[key]
    assert unrecorded.differences(state(epoch * 3)) == []  # older checkpoints do not record it
    assert unrecorded.with_prefixes_of(state(5)).order["epochs"] == 1  # from here on they do
    samples = []
    for count in (epoch // 2, epoch, epoch * 3):
        part = SplitData(IndexedDataset(prefix), "train", "1")
        dataset = MegatronOrderDataset(part, s, seed=1, num_samples=count)
        samples.append([dataset[i].tolist() for i in range(epoch // 2)])
    assert samples[0] == samples[1] != samples[2]
