"""The fast backend, gigatoken, checked against the library that defines the ids."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megalite.data.tokenizers import base
from megalite.data.tokenizers.base import Encoded, TokenizerError

PROBE = (
    "The quick  brown fox's 12345 jumps,\r\n\r\n\tover  the lazy dog!!  ",
    "naïve cafe\u0301 — 你好，世界 😀👩‍👩‍👧 \u200b\u00a0\u3000 \x00\x01\x7f İß ﬁ ½",
    "    \n\n  x\n \n  ",
    "\uff21\u0332 \uff76\u0334 \u2026\u0361",  # marks on letters that a normalizer replaces
    "a" * 300,
    "<|endoftext|></s><s> [MASK]<unk><0x0A>\u2581x",
    "",
)
"""Texts on which a fast tokenizer that misread its model is likely to differ."""
CACHE_BYTES = 200 << 20
"""Growth of the process after which the fast tokenizer is loaded again, with an empty cache."""
SHOWN_IDS = 5
"""Ids shown before and after the first that differs."""


class CheckedTokenizer(base.Tokenizer):
    """A tokenizer that encodes with gigatoken, and uses the reference for everything else.

    gigatoken takes the text of a special token for the token: texts that contain such a text are
    encoded by the reference. Raises TokenizerError with the reason if gigatoken is missing, cannot
    load this tokenizer, or gives other ids for PROBE.
    """

    backend = "fast"

    def __init__(self, reference: base.Tokenizer):
        self.reference = reference
        self.vocab_size = reference.vocab_size
        self.sha256 = reference.sha256
        try:
            self._library = base.import_library("gigatoken", "the fast backend")
            self._load()
        except BaseException as error:  # gigatoken has no error type; a panic is no Exception
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            reason = str(error).strip() or repr(error)
            raise TokenizerError(reason.splitlines()[0]) from None
        reserved = "|".join(map(re.escape, reference.reserved_texts))
        self._has_reserved_text = re.compile(reserved or "(?!)").search
        self.check(PROBE)

    def _load(self) -> None:
        """Load the fast tokenizer, with an empty cache."""
        self._fast = None  # first frees the memory of the old one
        self._fast = self.reference.load_fast(self._library)
        self._most_bytes = resident_bytes() + CACHE_BYTES

    @property
    def eod(self) -> int:
        """Id of the end-of-document token. Raises TokenizerError if there is none."""
        return self.reference.eod

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        """Encode texts: uint32 ids."""
        # One by one: gigatoken then keeps what it learned of words, which its SentencePiece batches
        # do not, and does not import awkward, which takes longer to load than a tokenizer. But it
        # never forgets a word.
        if resident_bytes() > self._most_bytes:
            self._load()
        return base.pack_ids(map(self._ids_of_text, texts), np.uint32)

    def _ids_of_text(self, text: str) -> np.ndarray:
        if self._has_reserved_text(text):
            return self.reference.encode_batch([text]).ids
        sections = self.reference.sections(text)
        return np.concatenate([self._fast.encode(section.encode()) for section in sections])

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of these ids. The end-of-document token has no text."""
        return self.reference.decode(ids)

    def check(self, texts: Sequence[str]) -> None:
        """Encode texts with both backends.

        Raises TokenizerError with the first text for which the fast one gives other ids.
        """
        fast_ids = self.encode_batch(texts).split()
        expected_ids = self.reference.encode_batch(texts).split()
        for text, fast, expected in zip(texts, fast_ids, expected_ids, strict=True):
            if not np.array_equal(fast, expected):
                raise TokenizerError(self._difference(text, fast, expected))

    def _difference(self, text: str, fast: np.ndarray, expected: np.ndarray) -> str:
        """The message that shows where two encodings of a text differ."""
        # The first id that differs; where one is the beginning of the other, the end of that.
        common = min(len(fast), len(expected))
        different = np.flatnonzero(fast[:common] != expected[:common])
        at = int(different[0]) if len(different) else common

        around = slice(max(0, at - SHOWN_IDS), at + SHOWN_IDS + 1)
        before = len(self.reference.decode(expected[:at])) if at else 0
        return (
            "gigatoken and the reference library encode a text differently, from id "
            f"{at} (near character {before}) on: {base.shortened(text[max(0, before - 20) :])} of "
            f"{len(text)} characters. gigatoken: {fast[around].tolist()}, reference: "
            f"{expected[around].tolist()}. Use --tokenizer-backend reference"
        )


def resident_bytes() -> int:
    """Resident memory of this process in bytes; 0 on a system without /proc."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except FileNotFoundError:
        return 0
