"""Data per architecture: datasets of samples, what their order depends on, and batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from megalite.data.bert import BertDataset
from megalite.data.bert_config import BertDataConfig
from megalite.data.config import DataConfig
from megalite.data.gpt import GPTDataset, SplitData
from megalite.data.loader import BertLoader, GPTLoader
from megalite.data.masking import Masker, special_ids
from megalite.data.megatron_order import MegatronOrderDataset, epochs_of
from megalite.data.mock import MockDataset, MockSentences
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


class GPTData(SampleConfig):
    """What a GPT reads."""

    pads: ClassVar[bool] = False
    """Whether samples differ in length, so that they are padded, and attention is masked."""

    def mock(self, split: str) -> MockDataset:
        """Samples of synthetic data."""
        return MockDataset(self.model.vocab_size, self.model.seq_length, self.seed, split)

    def dataset(self, split_data: SplitData, num_samples: int) -> Dataset:
        """The samples of one split of one source. num_samples: the number that the run takes.

        Raises DatasetError when there are none.
        """
        seq_length = self.model.seq_length
        options = {"seed": self.seed, "vocab_size": self.model.vocab_size}
        if self.data.sample_order == "megatron":
            return MegatronOrderDataset(split_data, seq_length, num_samples=num_samples, **options)
        stream = split_data.indexed.tokens(*split_data.documents)
        return GPTDataset(stream, seq_length, split=split_data.split, **options)

    def order(self, train_splits: Sequence[SplitData], num_samples: int) -> dict:
        """What the order of the samples depends on, beside seed and sequence length: its kind, and
        for that of Megatron-core the epochs that it was made for. Checkpoints record it.

        Args:
            train_splits: the training documents of each source.
            num_samples: number of samples that the run takes.
        """
        order = {"sample_order": self.data.sample_order}
        if self.data.sample_order == "megatron":
            for split_data in train_splits:
                epochs = epochs_of(split_data, self.model.seq_length, num_samples)
                order["epochs"] = epochs.epochs
                order["last_epoch_apart"] = epochs.apart
        return order

    def loader(self, dataset, data_size: int, data_rank: int, eod: int | None) -> GPTLoader:
        """The batches of one data-parallel rank.

        eod: id of the token that ends a document; None: the tokenizer's, if the configuration needs
        it. Raises TokenizerError when that is not known.
        """
        options = self.data.eod_options
        if eod is None and any(options.values()):
            eod = configured_tokenizer(self.data, self.model.vocab_size).eod
        rows = self.data.micro_batch_size
        return GPTLoader(dataset, rows, data_size, data_rank, eod=eod, **options)


class BertData(SampleConfig):
    """What a BERT reads."""

    pads: ClassVar[bool] = True

    def mock(self, split: str) -> BertDataset:
        """Samples of synthetic data."""
        sentences = MockSentences(self.model.vocab_size, self.seed, split)
        documents = (0, sentences.num_documents)
        special = (sentences.special, sentences.starts_word)
        return self._dataset(sentences, documents, split, *special)

    def dataset(self, split_data: SplitData, num_samples: int) -> BertDataset:
        """The samples of one split of one source.

        Raises DatasetError when there are none, and TokenizerError when the tokenizer lacks a
        special token.
        """
        documents = split_data.documents
        tokenizer = configured_tokenizer(self.data, self.model.vocab_size)
        special = (special_ids(tokenizer), getattr(tokenizer, "starts_word", None))
        return self._dataset(split_data.indexed, documents, split_data.split, *special)

    def _dataset(self, indexed, documents, split: str, special, starts_word) -> BertDataset:
        masker = Masker(special, self.model.vocab_size, starts_word, self.bert)
        options = {"masker": masker, "seed": self.seed, "split": split}
        return BertDataset(indexed, documents, self.model.seq_length, **options)

    def order(self, train_splits: Sequence[SplitData], num_samples: int) -> dict:
        """What the order of the samples depends on, beside seed and sequence length: how they are
        cut, paired and masked. Checkpoints record it."""
        return dict(vars(self.bert))

    def loader(self, dataset, data_size: int, data_rank: int, eod: int | None) -> BertLoader:
        """The batches of one data-parallel rank."""
        return BertLoader(dataset, self.data.micro_batch_size, data_size, data_rank)


DATA_OF = {"gpt": GPTData, "bert": BertData}
"""By `ModelConfig.architecture`."""
