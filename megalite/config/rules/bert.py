"""Rules of a BERT. Imports no torch."""

from collections.abc import Iterator
from typing import get_args

from megalite.config.rules.data import datasets_of, info_of, short_splits
from megalite.config.rules.disk import MAKE_DATA
from megalite.config.rules.finding import Finding, Rule, example_of
from megalite.config.rules.tokenizer import tokenizer_or_none
from megalite.config.run import RunConfig
from megalite.data.config import MaskingTokenizerType
from megalite.data.masking import special_ids
from megalite.data.mock import MockSentences
from megalite.data.tokenizers import TokenizerError

MASKING_TOKENIZERS = get_args(MaskingTokenizerType)


def sample_has_room(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """Two tokens beside [CLS] and [SEP]."""
    least = 4 if config.bert.bert_pair == "none" else 5
    length = config.model.seq_length
    if length < least:
        message = f"--seq-length {length} has no room for two tokens beside [CLS] and [SEP]"
        yield Finding(message, {"seq_length": least})


def tokens_can_be_masked(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """A tokenizer with [MASK] and the like for real data; entries beside them for mock data."""
    d = config.data
    vocab_size = config.model.vocab_size
    special = MockSentences.num_special
    if d.mock_data:
        if vocab_size is not None and 1 < vocab_size < special + 2:
            yield Finding(
                f"--vocab-size {vocab_size} leaves less than two entries beside the {special} "
                "special ones",
                example_of("vocab_size"),
            )
    elif d.tokenizer_type not in MASKING_TOKENIZERS and any(d.paths.values()):
        given = "without --tokenizer-type, there are no"
        if d.tokenizer_type:
            given = f"--tokenizer-type {d.tokenizer_type} has no"
        yield Finding(
            f"{given} tokens that frame and mask a BERT's samples",
            f"--tokenizer-type {' or '.join(MASKING_TOKENIZERS)}, as the data was made with",
        )


def tokenizer_has_masks(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """The tokenizer has the tokens that frame and mask samples, and knows where words begin if
    whole words are masked. Reads the tokenizer's files."""
    kind = config.data.tokenizer_type
    if config.data.mock_data or kind not in MASKING_TOKENIZERS:
        return  # tokens_can_be_masked reports what the flags alone show
    tokenizer = tokenizer_or_none(config)
    if tokenizer is None:
        return
    try:
        special_ids(tokenizer)
    except TokenizerError as error:
        yield Finding(str(error), "another --tokenizer-type")
    if config.bert.whole_word_mask and getattr(tokenizer, "starts_word", None) is None:
        yield Finding(
            f"--whole-word-mask: --tokenizer-type {kind} does not say which tokens begin a word",
            {"whole_word_mask": False},
            "--tokenizer-type BertWordPieceLowerCase or BertWordPieceCase",
        )


def data_has_sentences(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """Documents in every split, two for nsp; and for pairs, documents of more than one sentence."""
    pair = config.bert.bert_pair
    least = 1
    why = "one is needed"
    if pair == "nsp":
        least = 2
        why = "next-sentence prediction takes sentences of two"

    def count_documents(indexed, first: int, end: int) -> int:
        return end - first

    for key, prefix, indexed in datasets_of(config):
        short = short_splits(config, key, indexed, count_documents, least=least)
        for split, count, fixes in short:
            yield Finding(
                f"documents of {prefix} for {split}: {count}, but {why}",
                *fixes,
                "more data",
                also=("split",),
            )
        if pair != "none" and not _has_sentences(indexed, prefix):
            yield Finding(
                f"{prefix} was made without --split-sentences: pairs of segments would be cut "
                "anywhere",
                f"{MAKE_DATA} --split-sentences",
                {"bert_pair": "none"},
            )


def _has_sentences(indexed, prefix: str) -> bool:
    """Whether sequences are sentences, as PREFIX.json says, or else as it seems: not where every
    document is one sequence."""
    info = info_of(prefix)
    if info is not None and info.sentences is not None:
        return info.sentences
    return not 0 < len(indexed) == indexed.num_documents


BERT_RULES: tuple[Rule, ...] = (sample_has_room, tokens_can_be_masked)
BERT_FILE_RULES: tuple[Rule, ...] = (data_has_sentences, tokenizer_has_masks)
