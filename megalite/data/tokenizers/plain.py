"""Tokenizers that need no library: bytes, and numbers that are ids already."""

from collections.abc import Sequence
from hashlib import sha256

import numpy as np

from megalite.data.tokenizers.base import (
    Encoded,
    ReferenceTokenizer,
    TextError,
    TokenizerError,
    digest,
    encoded,
    shortened,
)


class ByteTokenizer(ReferenceTokenizer):
    """UTF-8 bytes as ids 0 to 255, and 256 for the end of a document."""

    vocab_size = 257
    eod = 256
    sha256 = sha256(b"ByteTokenizer").hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        """The bytes of each text."""
        data = [text.encode() for text in texts]
        lengths = np.array([len(text) for text in data], np.int64)
        return Encoded(np.frombuffer(b"".join(data), np.uint8).astype(np.int32), lengths)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these bytes; broken UTF-8 becomes the replacement character."""
        return bytes(i for i in map(int, ids) if i < 256).decode(errors="replace")


class NullTokenizer(ReferenceTokenizer):
    """Text is ids, written in decimal with white space between them; the last of `vocab_size` ids ends documents."""

    def __init__(self, vocab_size: int):
        if vocab_size < 1:
            raise TokenizerError(
                f"--vocab-size {vocab_size}: NullTokenizer needs at least 1, the end of a document"
            )
        self.vocab_size = vocab_size
        self.eod = vocab_size - 1
        self.sha256 = digest(f"NullTokenizer {vocab_size}")

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        """The numbers of each text. Raises TextError for a word that is no id of the vocabulary."""
        return encoded(map(self._encode, texts))

    def _encode(self, text: str) -> np.ndarray:
        text.encode()
        words = text.split()
        for word in words:
            if not (
                word.isascii()
                and word.isdecimal()
                and len(word) < 11
                and int(word) < self.vocab_size
            ):
                raise TextError(
                    f"{shortened(word)} in {shortened(text)} is no id from 0 to {self.vocab_size - 1}: NullTokenizer "
                    "takes text that is ids with spaces between them, below --vocab-size"
                )
        return np.array([int(word) for word in words], np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        """The numbers, a space between them."""
        return " ".join(str(int(i)) for i in ids if i != self.eod)
