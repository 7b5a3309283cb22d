# ruff: noqa: F401
"""Tokenizers behind one small interface, and their training."""

from megalite.data.config import TOKENIZER_FILES, TokenizerType
from megalite.data.tokenizers.base import TextError, Tokenizer, TokenizerError
from megalite.data.tokenizers.build import (
    build_tokenizer,
    checkpoint_data_config,
    configured_tokenizer,
    tokenizer_fields,
    trained_tokenizer,
)
from megalite.data.tokenizers.fast import CheckedTokenizer
from megalite.data.tokenizers.plain import ByteTokenizer
from megalite.data.tokenizers.train import train_bpe, train_sentencepiece, train_wordpiece
