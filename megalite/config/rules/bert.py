"""Rules of a BERT. Imports no torch."""

from collections.abc import Iterator

from megalite.config.rules.data import datasets_of, documents_of, other_splits
from megalite.config.rules.disk import MAKE_DATA
from megalite.config.rules.finding import (
    Finding,
    Rule,
    example_of,
    wanted_splits,
    without_evaluation,
)
from megalite.config.rules.tokenizer import build_tokenizer, files_of
from megalite.config.run import RunConfig

MASKING_TOKENIZERS = ("BertWordPieceLowerCase", "BertWordPieceCase", "HuggingFaceTokenizer")
"""Kinds of tokenizer that may have the tokens that frame and mask a BERT's samples."""


def sample_has_room(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """Two tokens beside [CLS] and [SEP]."""
    least = 4 if config.bert.bert_pair == "none" else 5
    length = config.model.seq_length
    if length < least:
        yield Finding(
            f"--seq-length {length} has no room for two tokens beside [CLS] and [SEP]",
            ("seq_length", "bert_pair"),
            ({"seq_length": least},),
        )


def tokens_can_be_masked(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """A tokenizer with [MASK] and the like for real data; entries beside them for mock data."""
    d = config.data
    if d.mock_data:
        yield from _mock_vocabulary_has_room(config)
    elif d.tokenizer_type not in MASKING_TOKENIZERS and any(d.paths.values()):
        given = "without --tokenizer-type, there are no"
        if d.tokenizer_type:
            given = f"--tokenizer-type {d.tokenizer_type} has no"
        yield Finding(
            f"{given} tokens that frame and mask a BERT's samples",
            ("tokenizer_type", "architecture"),
            (f"--tokenizer-type {' or '.join(MASKING_TOKENIZERS)}, as the data was made with",),
        )


def _mock_vocabulary_has_room(config: RunConfig) -> Iterator[Finding]:
    """Two entries of the vocabulary beside the special ones."""
    from megalite.data.mock import MockSentences

    vocab_size = config.model.vocab_size
    special = MockSentences.num_special
    if vocab_size is not None and 1 < vocab_size < special + 2:
        yield Finding(
            f"--vocab-size {vocab_size} leaves less than two entries beside the {special} special "
            "ones",
            ("vocab_size", "mock_data"),
            (example_of("vocab_size"),),
        )


def tokenizer_has_masks(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """The tokenizer has the tokens that frame and mask samples, and knows where words begin if
    whole words are masked. Reads the tokenizer's files."""
    from megalite.data.masking import special_ids
    from megalite.data.tokenizers import TokenizerError

    kind = config.data.tokenizer_type
    if config.data.mock_data or kind not in MASKING_TOKENIZERS:
        return  # tokens_can_be_masked reports what the flags alone show
    try:
        tokenizer = build_tokenizer(config)
    except (TokenizerError, OSError):
        return  # tokenizer_fits reports it
    if tokenizer is None:
        return
    try:
        special_ids(tokenizer)
    except TokenizerError as error:
        flags = ("architecture", "tokenizer_type", *files_of(config))
        yield Finding(str(error), flags, ("another --tokenizer-type",))
    if config.bert.whole_word_mask and getattr(tokenizer, "starts_word", None) is None:
        yield Finding(
            f"--whole-word-mask: --tokenizer-type {kind} does not say which tokens begin a word",
            ("whole_word_mask", "tokenizer_type"),
            (
                {"whole_word_mask": False},
                "--tokenizer-type BertWordPieceLowerCase or BertWordPieceCase",
            ),
        )


def data_has_sentences(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """Documents in every split, two for nsp; and for pairs, documents of more than one sentence."""
    pair = config.bert.bert_pair
    for key, prefix, indexed in datasets_of(config):
        yield from _splits_have_documents(config, key, prefix, indexed=indexed)
        if pair != "none" and _sentences(indexed, prefix) is False:
            yield Finding(
                f"{prefix} was made without --split-sentences: pairs of segments would be cut "
                "anywhere",
                (key, "bert_pair"),
                (f"{MAKE_DATA} --split-sentences", {"bert_pair": "none"}),
            )


def _splits_have_documents(config: RunConfig, key: str, prefix: str, indexed) -> Iterator[Finding]:
    """Enough documents of the dataset that field `key` names, in every split that reads it."""
    least = 1
    why = "one is needed"
    if config.bert.bert_pair == "nsp":
        least = 2
        why = "next-sentence prediction takes sentences of two"
    whole = key != "data_path"
    for split in wanted_splits(config):
        if config.data.words_of(split)[1] is not getattr(config.data, key):
            continue
        count = indexed.num_documents
        if not whole:
            count = documents_of(indexed, config.data.split)[split]
        if count >= least:
            continue
        flags = (key, "bert_pair")
        offers = [without_evaluation()] if split == "valid" else []
        if not whole:
            flags = (*flags, "split")
            offers = [*other_splits(config, indexed, documents_of, least=least), *offers]
        yield Finding(
            f"documents of {prefix} for {split}: {count}, but {why}", flags, (*offers, "more data")
        )


def _sentences(indexed, prefix: str) -> bool | None:
    """Whether sequences are sentences, as PREFIX.json says, or else as it seems: not where every
    document is one sequence. None: PREFIX.json cannot be read."""
    from megalite.data.indexed import DatasetError, DatasetInfo

    try:
        info = DatasetInfo.read(prefix)
    except DatasetError:
        return None
    if info is not None and info.sentences is not None:
        return info.sentences
    return not 0 < len(indexed) == indexed.num_documents


BERT_RULES: tuple[Rule, ...] = (sample_has_room, tokens_can_be_masked)
BERT_FILE_RULES: tuple[Rule, ...] = (data_has_sentences, tokenizer_has_masks)
