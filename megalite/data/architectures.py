"""Data per architecture: datasets of samples, what their order depends on, and batches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megalite.data.bert import BertDataset
from megalite.data.bert_config import BertDataConfig
from megalite.data.config import DataConfig
from megalite.data.gpt import SPLITS, GPTDataset, split_documents
from megalite.data.indexed import DatasetError, IndexedDataset
from megalite.data.masking import special_ids
from megalite.data.megatron_order import MegatronOrderDataset, epochs_of, split_sequences
from megalite.data.mock import MockDataset, MockSentences
from megalite.data.sampler import BatchLoader, BertLoader, Loader
from megalite.data.tokenizers import configured_tokenizer
from megalite.nn.config import ModelConfig

Dataset = GPTDataset | MegatronOrderDataset | MockDataset | BertDataset


@dataclass(frozen=True)
class SampleConfig:
    """What the samples of a run depend on, beside the split and the sources."""

    data: DataConfig
    model: ModelConfig
    seed: int
    bert: BertDataConfig


@dataclass(frozen=True)
class SplitData:
    """The documents of one dataset that belong to one split."""

    indexed: IndexedDataset
    split: str
    """One of SPLITS."""
    shares: str
    """Shares of the documents for the splits, as --split has them."""

    @classmethod
    def of(cls, indexed: IndexedDataset, split: str, data: DataConfig) -> "SplitData":
        """As configured: all documents when the data is for this split alone, else by --split."""
        shares = data.split
        if data.words_of(split)[0] != "--data-path":
            shares = ",".join("1" if name == split else "0" for name in SPLITS)
        return cls(indexed, split, shares)

    @property
    def documents(self) -> tuple[int, int]:
        """[first, last) document."""
        return split_documents(self.shares, self.indexed.num_documents)[self.split]


@dataclass(frozen=True)
class ArchitectureData:
    """What an architecture reads."""

    mock: Callable[[SampleConfig, str], Dataset]
    """(config, split) -> samples of synthetic data."""
    dataset: Callable[[SampleConfig, SplitData, int], Dataset]
    """(config, documents, number of samples that the run takes) -> the samples."""
    order: Callable[[SampleConfig, Sequence[SplitData], int], dict]
    """(config, training documents of each source, number of samples that the run takes) -> what
    the order of the samples depends on, beside seed and sequence length. Checkpoints record it."""
    loader: Callable[..., Loader]
    """(config, dataset, data_size, data_rank, eod) -> the batches of one data-parallel rank. eod:
    id of the token that ends a document; None: the tokenizer's, if the configuration needs it."""
    pads: bool = False
    """Whether samples differ in length, so that they are padded, and attention is masked."""


def gpt_mock(config: SampleConfig, split: str) -> MockDataset:
    """Synthetic samples of a GPT."""
    model = config.model
    return MockDataset(model.vocab_size, model.seq_length, config.seed, split)


def gpt_dataset(config: SampleConfig, part: SplitData, samples: int) -> Dataset:
    """The samples of a GPT in one split of one source. Raises DatasetError when there are none."""
    model = config.model
    if config.data.sample_order == "megatron":
        return MegatronOrderDataset(
            part.indexed,
            part.shares,
            part.split,
            seq_length=model.seq_length,
            seed=config.seed,
            samples=samples,
            vocab_size=model.vocab_size,
        )
    stream = part.indexed.tokens(*_documents(part))
    return GPTDataset(
        stream, model.seq_length, config.seed, split_name=part.split, vocab_size=model.vocab_size
    )


def gpt_order(config: SampleConfig, parts: Sequence[SplitData], samples: int) -> dict:
    """The kind of order, and for that of Megatron-core the epochs that it was made for."""
    order = {"sample_order": config.data.sample_order}
    if config.data.sample_order == "megatron":
        for part in parts:
            first, last = split_sequences(part.shares, len(part.indexed))[part.split]
            tokens = int(part.indexed.lengths[first:last].sum(dtype=np.int64))
            epochs = epochs_of(tokens, config.model.seq_length, samples)
            order["epochs"] = epochs.epochs
            order["last_epoch_apart"] = epochs.apart
    return order


def gpt_loader(
    config: SampleConfig, dataset, data_size: int, data_rank: int, eod: int | None = None
) -> BatchLoader:
    """Batches of a GPT. Raises TokenizerError when the token that ends a document is not known."""
    data = config.data
    if eod is None and data.eod_matters:
        eod = configured_tokenizer(data, config.model.vocab_size).eod
    return BatchLoader(
        dataset,
        data.micro_batch_size,
        data_size,
        data_rank,
        eod=eod,
        eod_mask_loss=data.eod_mask_loss,
        reset_position_ids=data.reset_position_ids,
        reset_attention_mask=data.reset_attention_mask,
    )


def bert_mock(config: SampleConfig, split: str) -> BertDataset:
    """Synthetic samples of a BERT."""
    sentences = MockSentences(config.model.vocab_size, config.seed, split)
    return BertDataset(
        sentences,
        (0, sentences.num_documents),
        config.model.seq_length,
        seed=config.seed,
        split_name=split,
        special=sentences.special,
        vocab_size=sentences.vocab_size,
        starts_word=sentences.starts_word,
        config=config.bert,
    )


def bert_dataset(config: SampleConfig, part: SplitData, samples: int) -> BertDataset:
    """The samples of a BERT in one split of one source.

    Raises DatasetError when there are none, and TokenizerError when the tokenizer lacks a special
    token.
    """
    model = config.model
    documents = _documents(part)
    tokenizer = configured_tokenizer(config.data, model.vocab_size)
    return BertDataset(
        part.indexed,
        documents,
        model.seq_length,
        seed=config.seed,
        split_name=part.split,
        special=special_ids(tokenizer),
        vocab_size=model.vocab_size,
        starts_word=getattr(tokenizer, "starts_word", None),
        config=config.bert,
    )


def bert_order(config: SampleConfig, parts: Sequence[SplitData], samples: int) -> dict:
    """How samples are cut, paired and masked."""
    return dict(vars(config.bert))


def bert_loader(
    config: SampleConfig, dataset, data_size: int, data_rank: int, eod: int | None = None
) -> BertLoader:
    """Batches of a BERT."""
    return BertLoader(dataset, config.data.micro_batch_size, data_size, data_rank)


def _documents(part: SplitData) -> tuple[int, int]:
    """The documents of a split. Raises DatasetError when there are none."""
    first, last = part.documents
    if first == last:
        raise DatasetError(
            f"split '{part.split}' is empty: --split {part.shares} gives it none of the "
            f"{part.indexed.num_documents} documents of {part.indexed.prefix}. Give it a larger "
            f"share, or request no {part.split} samples"
        )
    return first, last


GPT_DATA = ArchitectureData(gpt_mock, gpt_dataset, order=gpt_order, loader=gpt_loader)
BERT_DATA = ArchitectureData(
    bert_mock, bert_dataset, order=bert_order, loader=bert_loader, pads=True
)
DATA_OF = {"gpt": GPT_DATA, "bert": BERT_DATA}
"""By `ModelConfig.architecture`."""
