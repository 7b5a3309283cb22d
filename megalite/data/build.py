"""From the configuration to datasets."""

from collections.abc import Iterator, Mapping
from functools import cache

from megalite.data.architectures import DATA_OF, Dataset
from megalite.data.bert_config import BertDataConfig
from megalite.data.blend import BlendedDataset
from megalite.data.config import DataConfig
from megalite.data.gpt import SPLITS, SplitData
from megalite.data.indexed import DatasetError, IndexedDataset
from megalite.data.sources import DataState, Source, UsedSource, parse_sources
from megalite.nn.config import ModelConfig

MOCK = Source(1.0, "--mock-data")


def build_sources(
    data: DataConfig, model: ModelConfig, seed: int, sample_counts: Mapping[str, int], bert=None
) -> dict[str, list[tuple[Source, Dataset]]]:
    """The datasets of each requested split ("train", "valid", "test"), with their weights.

    Each dataset is opened once, however many splits use it.

    Args:
        data, model, seed: as configured.
        sample_counts: how many samples of each split the run takes; only --sample-order megatron
            depends on it.
        bert: a BertDataConfig: how the samples of a BERT are made. None: by the defaults.

    Raises DatasetError when there is no data, a file is unusable, or a requested split is empty or
    shorter than a sample; TokenizerError when a BERT's tokenizer lacks a token that it needs.
    """
    sample_config = DATA_OF[model.architecture](data, model, seed, bert or BertDataConfig())
    if data.mock_data:
        if model.vocab_size is None:
            raise DatasetError("--mock-data needs --vocab-size")
        return {split: [(MOCK, sample_config.mock(split))] for split in sample_counts}
    open_dataset = cache(IndexedDataset)
    built = {}
    for split, count in sample_counts.items():
        built[split] = []
        for source, split_data in _sources_of(data, split, open_dataset):
            built[split].append((source, sample_config.dataset(split_data, count)))
    return built


def _sources_of(data: DataConfig, split: str, open_dataset) -> Iterator[tuple[Source, SplitData]]:
    """The sources of a split: all their documents when they are for it alone, else by --split."""
    flag, words = data.words_of(split)
    if words is None:
        raise DatasetError(
            f"no data for {split} samples: give {flag} PREFIX, or --mock-data with --vocab-size"
        )
    shares = data.split
    if flag != "--data-path":
        shares = ",".join("1" if name == split else "0" for name in SPLITS)
    for source in parse_sources(words, flag):
        yield source, SplitData(open_dataset(source.prefix), split, shares)


def data_state(
    data: DataConfig, model: ModelConfig, seed: int, num_samples: int, bert=None
) -> DataState:
    """The state of a run that starts with the configured training data.

    Opens the files; builds no order.

    Args:
        data, model, seed, bert: see build_sources.
        num_samples: how many training samples the run takes in all.

    Raises DatasetError for two sources with equal contents.
    """
    sample_config = DATA_OF[model.architecture](data, model, seed, bert or BertDataConfig())
    used = []
    train_splits = []
    if data.mock_data:
        fingerprint = sample_config.mock("train").fingerprint()
        used.append(UsedSource(MOCK.prefix, MOCK.weight, fingerprint, consumed=0))
    else:
        prefixes = {}
        for source, split_data in _sources_of(data, "train", IndexedDataset):
            fingerprint = split_data.indexed.tokens(*split_data.documents).fingerprint()
            if fingerprint in prefixes:
                flag, _ = data.words_of("train")
                raise DatasetError(
                    f"{flag}: {prefixes[fingerprint]} and {source.prefix} have the same contents; "
                    "name one, with the sum of the weights"
                )
            prefixes[fingerprint] = source.prefix
            used.append(UsedSource(source.prefix, source.weight, fingerprint, consumed=0))
            train_splits.append(split_data)
    order = {"seed": seed, "seq_length": model.seq_length}
    order |= sample_config.order(train_splits, num_samples)
    return DataState(order, tuple(used))


def blended(sources: list[tuple[Source, object]], state: DataState | None = None) -> BlendedDataset:
    """One dataset of weighted sources, each of which continues as `state` says.

    state: None starts each source at its first sample.
    """
    given, datasets = zip(*sources)
    weights = [source.weight for source in given]
    if state is None:
        return BlendedDataset(datasets, weights)
    consumed = [source.consumed for source in state.sources]
    return BlendedDataset(datasets, weights, state.start, consumed)
