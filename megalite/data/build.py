"""From the configuration to datasets."""

from collections.abc import Mapping

import numpy as np

from megalite.data.bert import BertDataset
from megalite.data.bert_config import BertDataConfig
from megalite.data.blend import BlendedDataset
from megalite.data.config import DataConfig
from megalite.data.gpt import SPLITS, GPTDataset, split_documents
from megalite.data.indexed import DatasetError, IndexedDataset
from megalite.data.masking import SpecialIds
from megalite.data.megatron_order import MegatronOrderDataset, epochs_of, split_sequences
from megalite.data.mock import MockDataset, MockSentences
from megalite.data.sources import DataState, Source, UsedSource, parse_sources
from megalite.data.tokenizers import Tokenizer, TokenizerError, configured_tokenizer
from megalite.nn.config import ModelConfig

MOCK = Source(1.0, "--mock-data")
FRAMES = (("[CLS]", "[SEP]", "[MASK]", "[PAD]"), ("<s>", "</s>", "<mask>", "<pad>"))
"""Names of the tokens that frame and mask BERT's samples: BERT's and RoBERTa's."""

Dataset = GPTDataset | MegatronOrderDataset | MockDataset | BertDataset


def build_sources(
    data: DataConfig,
    model: ModelConfig,
    seed: int,
    samples: Mapping[str, int],
    bert: BertDataConfig | None = None,
) -> dict[str, list[tuple[Source, Dataset]]]:
    """The datasets of each wanted split ("train", "valid", "test"), with their weights.

    samples: how many samples of each wanted split the run will ask for; only --sample-order megatron depends on it.
    bert: how the samples of a BERT are made.
    Raises DatasetError when there is no data, a file is unusable, or a wanted split is empty or shorter than a sample;
    TokenizerError when a BERT's tokenizer lacks a token that it needs.
    """
    if data.mock_data:
        if model.vocab_size is None:
            raise DatasetError("--mock-data needs --vocab-size")
        return {split: [(MOCK, _mock(model, seed, split, bert))] for split in samples}
    built = {}
    for split, number in samples.items():
        flag, words = data.words_of(split)
        if words is None:
            raise DatasetError(
                f"no data for {split} samples: give {flag} PREFIX, or --mock-data with --vocab-size"
            )
        whole = flag != "--data-path"
        built[split] = [
            (source, _dataset(data, model, seed, split, source.prefix, number, whole, bert))
            for source in parse_sources(words, flag)
        ]
    return built


def _mock(
    model: ModelConfig, seed: int, split: str, bert: BertDataConfig | None
) -> MockDataset | BertDataset:
    if model.architecture != "bert":
        return MockDataset(model.vocab_size, model.seq_length, seed, split)
    made, s, v = MockSentences(model.vocab_size, seed, split), model.seq_length, model.vocab_size
    return BertDataset(
        made, (0, made.num_documents), s, seed, split, made.special, v, made.starts_word, bert
    )


def _dataset(
    data: DataConfig,
    model: ModelConfig,
    seed: int,
    split: str,
    prefix: str,
    samples: int,
    whole: bool,
    bert: BertDataConfig | None,
) -> Dataset:
    """The samples of one split of one source; of all its documents when the source is for this split alone."""
    indexed, s, v = IndexedDataset(prefix), model.seq_length, model.vocab_size
    if data.sample_order == "megatron":
        return MegatronOrderDataset(
            indexed, _shares(data, split, whole), split, s, seed, samples, v
        )
    first, last = documents = _documents(data, indexed, split, whole)
    if first == last:
        raise DatasetError(
            f"split '{split}' is empty: --split {data.split} gives it none of the {indexed.num_documents} documents of "
            f"{prefix}. Give it a larger share, or ask for no {split} samples"
        )
    if model.architecture == "bert":
        tokenizer = configured_tokenizer(data, v)
        starts_word = getattr(tokenizer, "starts_word", None)
        return BertDataset(
            indexed, documents, s, seed, split, special_ids(tokenizer), v, starts_word, bert
        )
    return GPTDataset(indexed.tokens(first, last), s, seed, split, v)


def special_ids(tokenizer: Tokenizer) -> SpecialIds:
    """The ids that frame and mask BERT's samples. Raises TokenizerError when the vocabulary lacks one."""
    found = [tokenizer.ids_of(names) for names in FRAMES] if hasattr(tokenizer, "ids_of") else []
    whole = [ids for ids in found if None not in ids]
    if not whole:
        raise TokenizerError(
            f"BERT needs a vocabulary with {' '.join(FRAMES[0])} (or {' '.join(FRAMES[1])}), which this tokenizer has "
            "not: use --tokenizer-type BertWordPieceLowerCase or BertWordPieceCase with a vocab.txt"
        )
    return SpecialIds(*whole[0])


def _documents(
    data: DataConfig, indexed: IndexedDataset, split: str, whole: bool
) -> tuple[int, int]:
    """[first, last) document of a split."""
    return (
        (0, indexed.num_documents)
        if whole
        else split_documents(data.split, indexed.num_documents)[split]
    )


def _shares(data: DataConfig, split: str, whole: bool) -> str:
    """The --split that gives a split its documents: all of those of a source for it alone."""
    return ",".join("1" if name == split else "0" for name in SPLITS) if whole else data.split


def data_state(
    data: DataConfig,
    model: ModelConfig,
    seed: int,
    samples: int,
    bert: BertDataConfig | None = None,
) -> DataState:
    """The state of a run that starts with the configured training data, and takes so many samples of it in all.

    Opens the files; builds no order. Raises DatasetError for two sources of equal contents.
    """
    order = {"seed": seed, "seq_length": model.seq_length}
    order |= (
        vars(bert or BertDataConfig())
        if model.architecture == "bert"
        else {"sample_order": data.sample_order}
    )
    if data.mock_data:
        return DataState(
            order,
            (UsedSource(MOCK.prefix, 1.0, _mock(model, seed, "train", bert).fingerprint(), 0),),
        )
    flag, words = data.words_of("train")
    used, whole = [], flag != "--data-path"
    for source in parse_sources(words, flag):
        indexed = IndexedDataset(source.prefix)
        fingerprint = indexed.tokens(*_documents(data, indexed, "train", whole)).fingerprint()
        if twin := next((other for other in used if other.fingerprint == fingerprint), None):
            raise DatasetError(
                f"{flag}: {twin.prefix} and {source.prefix} hold the same; name one, with the sum of the weights"
            )
        used.append(UsedSource(source.prefix, source.weight, fingerprint, 0))
        if data.sample_order == "megatron" and model.architecture == "gpt":
            first, last = split_sequences(_shares(data, "train", whole), len(indexed))["train"]
            tokens = int(indexed.lengths[first:last].sum(dtype=np.int64))
            made_for = epochs_of(tokens, model.seq_length, samples)
            order |= {"epochs": made_for.epochs, "last_epoch_apart": made_for.apart}
    return DataState(order, tuple(used))


def blended(sources: list[tuple[Source, object]], state: DataState | None = None) -> BlendedDataset:
    """One dataset of weighted sources, each going on where `state` says. None: from their first samples."""
    datasets, weights = (
        [dataset for _, dataset in sources],
        [source.weight for source, _ in sources],
    )
    if state is None:
        return BlendedDataset(datasets, weights)
    return BlendedDataset(
        datasets, weights, state.start, [source.consumed for source in state.sources]
    )
