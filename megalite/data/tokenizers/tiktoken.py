"""Byte-level BPE from files of ranks, by the tiktoken library."""

import base64
import binascii
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from megalite.data.tokenizers.base import (
    Encoded,
    ReferenceTokenizer,
    TokenizerError,
    digest,
    encoded,
    library,
    read,
    refuse_surrogates,
)

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"


class Encoding(NamedTuple):
    """What a file of ranks does not tell."""

    pattern: str
    """How text is cut before pieces are merged."""
    fast: str
    """What gigatoken calls the pattern."""
    special: dict[str, int]


ENCODINGS = {
    "r50k_base": Encoding(
        r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
        "gpt2",
        {"<|endoftext|>": 50256},
    ),
    "cl100k_base": Encoding(
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]"
        r"|\s+(?!\S)|\s",
        "gpt4",
        {
            "<|endoftext|>": 100257,
            "<|fim_prefix|>": 100258,
            "<|fim_middle|>": 100259,
            "<|fim_suffix|>": 100260,
            "<|endofprompt|>": 100276,
        },
    ),
    "o200k_base": Encoding(
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        + CONTRACTIONS
        + "|"
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        + CONTRACTIONS
        + "|"
        r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        "o200k",
        {"<|endoftext|>": 199999, "<|endofprompt|>": 200018},
    ),
}
"""The published encodings: facts of the format, known by the names of their files."""


class TikTokenizer(ReferenceTokenizer):
    """A .tiktoken file of ranks, whose name says the encoding (cl100k_base.tiktoken); nothing is downloaded.

    The text of a special token is ordinary text. Decoding gives back the text that was encoded. Raises TokenizerError
    when the library or the file is missing, the name tells no encoding, or the file holds no ranks.
    """

    def __init__(self, path: str | Path):
        tiktoken = library("tiktoken", "TikTokenizer")
        content = read(path, "--tokenizer-model")
        name = next((name for name in ENCODINGS if name in Path(path).name), None)
        if name is None:
            raise TokenizerError(
                f"--tokenizer-model {path}: the name tells how text is cut into words, which the file does not: it "
                f"must have {', '.join(ENCODINGS)} in it"
            )
        self._path, self._fast = path, ENCODINGS[name].fast
        ranks, special = _ranks(content, path), ENCODINGS[name].special
        if max(ranks.values()) >= min(special.values()):
            raise TokenizerError(
                f"--tokenizer-model {path}: {len(ranks)} ranks, too many for {name}, whose special tokens start at "
                f"{min(special.values())}"
            )
        self._encoding = tiktoken.Encoding(
            name, pat_str=ENCODINGS[name].pattern, mergeable_ranks=ranks, special_tokens=special
        )
        self.vocab_size = max(special.values()) + 1
        self.eod = special["<|endoftext|>"]
        self.sha256 = digest(f"TikTokenizer {name}", content)

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        """Ids of each text."""
        refuse_surrogates(texts)  # tiktoken would replace them
        return encoded(self._encoding.encode_ordinary(text) for text in texts)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these ids; broken UTF-8 becomes the replacement character."""
        return self._encoding.decode([int(i) for i in ids if i != self.eod])

    def load_fast(self, gigatoken):
        """The same pattern, without special tokens, so that their text is ordinary text."""
        return gigatoken.Tokenizer.from_tiktoken(self._path, self._fast, {})


def _ranks(content: bytes, path: str | Path) -> dict[bytes, int]:
    """Shard -> rank, from lines of base64 and a number. Raises TokenizerError."""
    try:
        lines = [line.split() for line in content.splitlines() if line]
        ranks = {base64.b64decode(piece, validate=True): int(rank) for piece, rank in lines}
    except (ValueError, binascii.Error):
        ranks = {}
    if any(bytes([byte]) not in ranks for byte in range(256)):
        raise TokenizerError(
            f"--tokenizer-model {path}: not a file of ranks (a piece in base64 and its rank in each line, all 256 "
            "bytes among them)"
        )
    return ranks
