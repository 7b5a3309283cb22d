"""Rules of a BERT, as far as the flags alone tell. Imports no torch."""

from collections.abc import Iterator

from megalite.config.rules.finding import EXAMPLES, PATHS, Finding, Rule
from megalite.config.run import RunConfig

MASKING_TOKENIZERS = ("BertWordPieceLowerCase", "BertWordPieceCase", "HuggingFaceTokenizer")
"""Kinds of tokenizer that may have the tokens that frame and mask a BERT's samples."""


def norms_have_a_place(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """Post-norm is for BERT."""
    if config.model.post_norm and not config.is_bert:
        yield Finding(
            "--norm-placement post is for BERT; a GPT normalises what goes into its sublayers",
            ("norm_placement", "architecture"),
            ({"norm_placement": "pre"},),
        )


def sample_has_room(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """Two tokens beside [CLS] and [SEP]."""
    least = 4 if config.bert.bert_pair == "none" else 5
    if config.is_bert and config.model.seq_length < least:
        yield Finding(
            f"--seq-length {config.model.seq_length} has no room for two tokens beside [CLS] and [SEP]",
            ("seq_length", "bert_pair"),
            ({"seq_length": least},),
        )


def tokens_can_be_masked(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """A tokenizer with [MASK] and the like for real data; entries beside them for made-up data."""
    d, vocab_size = config.data, config.model.vocab_size
    if not config.is_bert:
        return
    if d.mock_data:
        from megalite.data.mock import MockSentences

        special = MockSentences.num_special
        if vocab_size is not None and 1 < vocab_size < special + 2:
            yield Finding(
                f"--vocab-size {vocab_size} leaves less than two entries beside the {special} special ones",
                ("vocab_size", "mock_data"),
                ({"vocab_size": EXAMPLES["vocab_size"]},),
            )
    elif d.tokenizer_type not in MASKING_TOKENIZERS and any(
        getattr(d, key) is not None for key in PATHS
    ):
        given = (
            f"--tokenizer-type {d.tokenizer_type} has no"
            if d.tokenizer_type
            else "no --tokenizer-type tells the"
        )
        yield Finding(
            f"{given} tokens that frame and mask a BERT's samples",
            ("tokenizer_type", "architecture"),
            (f"--tokenizer-type {' or '.join(MASKING_TOKENIZERS)}, as the data was made with",),
        )


BERT_RULES: tuple[Rule, ...] = (norms_have_a_place, sample_has_room, tokens_can_be_masked)
