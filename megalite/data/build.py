"""From the configuration to datasets."""

from collections.abc import Sequence

from megalite.data.config import DataConfig
from megalite.data.gpt import GPTDataset, split_documents
from megalite.data.indexed import DatasetError, IndexedDataset
from megalite.data.mock import MockDataset
from megalite.nn.config import ModelConfig


def build_datasets(
    data: DataConfig, model: ModelConfig, seed: int, wanted: Sequence[str]
) -> dict[str, GPTDataset | MockDataset]:
    """The wanted splits ("train", "valid", "test") of the configured data, by name.

    Raises DatasetError when there is no data, a file is unusable, or a wanted split is empty or shorter than a sample.
    """
    if data.mock_data:
        if model.vocab_size is None:
            raise DatasetError("--mock-data needs --vocab-size")
        return {split: MockDataset(model.vocab_size, model.seq_length, seed, split) for split in wanted}
    if data.data_path is None:
        raise DatasetError("no data: give --data-path PREFIX, or --mock-data with --vocab-size")
    indexed = IndexedDataset(data.data_path)
    documents = split_documents(data.split, indexed.num_documents)
    datasets = {}
    for split in wanted:
        first, last = documents[split]
        if first == last:
            raise DatasetError(
                f"split '{split}' is empty: --split {data.split} gives it none of the {indexed.num_documents} "
                f"documents of {data.data_path}. Give it a larger share, or ask for no {split} samples"
            )
        datasets[split] = GPTDataset(indexed.tokens(first, last), model.seq_length, seed, split, model.vocab_size)
    return datasets
