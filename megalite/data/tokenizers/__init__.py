"""Tokenizers behind one small interface, and training them. Libraries are imported where used."""

from megalite.data.config import TOKENIZER_FILES, TokenizerType
from megalite.data.tokenizers.base import Encoded, TextError, Tokenizer, TokenizerError, encoded
from megalite.data.tokenizers.build import (
    TokenizerBackend,
    build_tokenizer,
    configured_tokenizer,
    trained_tokenizer,
    with_tokenizer,
)
from megalite.data.tokenizers.fast import CheckedTokenizer
from megalite.data.tokenizers.plain import ByteTokenizer, NullTokenizer
from megalite.data.tokenizers.train import train_bpe, train_sentencepiece, train_wordpiece

__all__ = [
    "TOKENIZER_FILES",
    "ByteTokenizer",
    "CheckedTokenizer",
    "Encoded",
    "NullTokenizer",
    "TextError",
    "Tokenizer",
    "TokenizerBackend",
    "TokenizerError",
    "TokenizerType",
    "build_tokenizer",
    "configured_tokenizer",
    "encoded",
    "train_bpe",
    "train_sentencepiece",
    "train_wordpiece",
    "trained_tokenizer",
    "with_tokenizer",
]
