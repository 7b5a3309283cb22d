"""The fast backend, gigatoken, held against the library that defines the ids."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megalite.data.tokenizers.base import (
    Encoded,
    ReferenceTokenizer,
    TokenizerError,
    encoded,
    library,
    shortened,
)

PROBE = (
    "The quick  brown fox's 12345 jumps,\r\n\r\n\tover  the lazy dog!!  ",
    "naïve cafe\u0301 — 你好，世界 😀👩‍👩‍👧 \u200b\u00a0\u3000 \x00\x01\x7f İß ﬁ ½",
    "    \n\n  x\n \n  ",
    "\uff21\u0332 \uff76\u0334 \u2026\u0361",  # marks on letters that a normaliser replaces
    "a" * 300,
    "<|endoftext|></s><s> [MASK]<unk><0x0A>\u2581x",
    "",
)
"""Texts on which a fast tokenizer that misunderstood its model is likely to differ."""
CACHE_BYTES = 200 << 20
"""What a process may grow by before the fast tokenizer forgets the words that it has seen."""
SHOWN_IDS = 5
"""Ids shown before and after the first that differs."""


class CheckedTokenizer:
    """A tokenizer that encodes by gigatoken; everything else, and the few texts it is not good for, by the reference.

    gigatoken takes the text of special tokens for the tokens, which nobody wants of a document: texts with such a text
    in them are encoded by the reference. Raises TokenizerError when gigatoken is missing or does not take this
    tokenizer, with the reason.
    """

    backend = "fast"
    why = ""

    def __init__(self, reference: ReferenceTokenizer):
        self.reference = reference
        self.vocab_size, self.sha256 = reference.vocab_size, reference.sha256
        try:
            self._library = library("gigatoken", "the fast backend")
            self._load()
        except Exception as error:  # gigatoken has no error type of its own
            raise TokenizerError((str(error).strip() or repr(error)).splitlines()[0]) from None
        self._marks = (
            re.compile("|".join(map(re.escape, reference.marks))) if reference.marks else None
        )
        self.check(PROBE)

    def _load(self) -> None:
        """The fast tokenizer, with nothing in its cache."""
        self._fast = None
        self._fast = self.reference.load_fast(self._library)
        self._most_bytes = resident_bytes() + CACHE_BYTES

    @property
    def eod(self) -> int:
        """Id of the end-of-document token. Raises TokenizerError when there is none."""
        return self.reference.eod

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        """Ids of each text, uint32 unless the reference had to help."""
        marked = [
            number for number, text in enumerate(texts) if self._marks and self._marks.search(text)
        ]
        if not marked:
            return self._encode(texts)
        left = set(marked)
        by_fast = iter(
            self._encode([text for number, text in enumerate(texts) if number not in left]).split()
        )
        by_reference = iter(
            self.reference.encode_batch([texts[number] for number in marked]).split()
        )
        ids = [next(by_reference if number in left else by_fast) for number in range(len(texts))]
        return Encoded(np.concatenate(ids), np.array([len(text) for text in ids], np.int64))

    def _encode(self, texts: Sequence[str]) -> Encoded:
        # One by one: gigatoken then keeps what it learned of words, which its SentencePiece batches do not, and needs
        # no awkward arrays, whose library takes longer to load than a tokenizer. But it keeps it all.
        if resident_bytes() > self._most_bytes:
            self._load()
        return encoded(map(self._fast.encode, map(str.encode, texts)), np.uint32)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these ids; an end-of-document token gives none."""
        return self.reference.decode(ids)

    def check(self, texts: Sequence[str]) -> None:
        """Encode texts by both. Raises TokenizerError with the first text that gets other ids from the fast one."""
        pairs = zip(self.encode_batch(texts).split(), self.reference.encode_batch(texts).split())
        for text, (fast, expected) in zip(texts, pairs):
            if not np.array_equal(fast, expected):
                raise TokenizerError(self._difference(text, fast, expected))

    def _difference(self, text: str, fast: np.ndarray, expected: np.ndarray) -> str:
        common = min(len(fast), len(expected))
        different = np.flatnonzero(fast[:common] != expected[:common])
        at = int(different[0]) if len(different) else common
        around = slice(max(0, at - SHOWN_IDS), at + SHOWN_IDS + 1)
        before = len(self.reference.decode(expected[:at])) if at else 0
        return (
            f"gigatoken encodes a text in another way than the reference library, from id {at} (near character "
            f"{before}) on: {shortened(text[max(0, before - 20) :])} of {len(text)} characters. "
            f"gigatoken: {fast[around].tolist()}, reference: {expected[around].tolist()}. "
            "Use --tokenizer-backend reference"
        )


def resident_bytes() -> int:
    """Memory that this process holds; 0 where the system has no /proc to tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except FileNotFoundError:
        return 0
