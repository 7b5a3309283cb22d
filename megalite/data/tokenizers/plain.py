"""Tokenizers that need no library: bytes, and text that is ids already."""

from collections.abc import Sequence
from hashlib import sha256

import numpy as np

from megalite.data.tokenizers import base
from megalite.data.tokenizers.base import Encoded, TextError, TokenizerError, shortened


class ByteTokenizer(base.Tokenizer):
    """UTF-8 bytes as ids 0 to 255; id 256 ends documents."""

    vocab_size = 257
    eod = 256
    sha256 = sha256(b"ByteTokenizer").hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        """Return the bytes of each text."""
        data = list(map(str.encode, texts))
        lengths = np.array(list(map(len, data)), np.int64)
        return Encoded(np.frombuffer(b"".join(data), np.uint8).astype(np.int32), lengths)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of these bytes. Broken UTF-8 becomes the replacement character."""
        return bytes(i for i in map(int, ids) if i < 256).decode(errors="replace")


class NullTokenizer(base.Tokenizer):
    """Text is ids in decimal, separated by white space; the last of `vocab_size` ends documents.

    Raises TokenizerError if there is no id for that.
    """

    def __init__(self, vocab_size: int):
        if vocab_size < 1:
            raise TokenizerError(
                f"--vocab-size {vocab_size}: NullTokenizer needs at least 1, the end of a document"
            )
        self.vocab_size = vocab_size
        self.eod = vocab_size - 1
        self.sha256 = base.digest(f"NullTokenizer {vocab_size}")

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        """Return the ids in each text. Raises TextError for a word that is not an id."""
        return base.pack_ids(map(self._encode, texts))

    def _encode(self, text: str) -> np.ndarray:
        text.encode()  # raises UnicodeEncodeError for lone surrogates
        words = text.split()
        for word in words:
            # At most 10 digits, since Python refuses to convert thousands of them.
            decimal = word.isascii() and word.isdecimal() and len(word) < 11
            if not decimal or int(word) >= self.vocab_size:
                raise TextError(
                    f"{shortened(word)} in {shortened(text)} is no id from 0 to "
                    f"{self.vocab_size - 1}: NullTokenizer takes text that is ids below "
                    "--vocab-size, separated by spaces"
                )
        return np.array(list(map(int, words)), np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the ids, separated by spaces."""
        return " ".join(str(int(i)) for i in ids if i != self.eod)
