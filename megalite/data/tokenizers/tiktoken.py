"""Byte-level BPE from files of ranks, by the tiktoken library."""

import base64
import binascii
import hashlib
import json
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

from megalite.data.tokenizers import base
from megalite.data.tokenizers.base import Encoded, TokenizerError
from megalite.data.tokenizers.tiktoken_json import tokenizer_json
from megalite.data.tokenizers.tiktoken_patterns import ENCODINGS, IN_FILE_NAMES, PUBLISHED, nfc


class TikTokenizer(base.Tokenizer):
    """A file of BPE ranks: .tiktoken, tokenizer.model of Llama 3 and 4, or Megatron-LM's JSON.

    The file does not say how text is split into words, nor which special tokens there are. These
    come from `encoding`, a key of ENCODINGS; None: it is that of a published file, recognized by
    its SHA-256, or one of IN_FILE_NAMES that the file's name contains. Nothing is downloaded.

    Decoding gives back the text that was encoded, for Qwen in Unicode NFC. Raises TokenizerError
    if the library or the file is missing, the encoding is not known, or the file has no ranks.
    """

    def __init__(self, path: str | Path, encoding: str | None = None):
        tiktoken = base.import_library("tiktoken", "TikTokenizer")
        content = base.read_file(path, "--tokenizer-model")
        name = encoding or _find_encoding(content, path)
        self._path = path
        self._known = ENCODINGS[name]
        self.sections = self._known.sections

        ids = {}
        for token, rank in _read_ranks(content, path).items():
            if rank < self._known.most_ranks:
                ids[token] = rank + self._known.first_id
        special = self._known.special
        taken = set(ids.values()).intersection(special.values())
        if taken:
            raise TokenizerError(
                f"--tokenizer-model {path}: {len(ids)} ranks do not fit {name}: id {min(taken)} is "
                "that of a special token. Give another --tiktoken-pattern"
            )

        self._encoding = tiktoken.Encoding(
            name, pat_str=self._known.pattern, mergeable_ranks=ids, special_tokens=special
        )
        self._encode = self._encoding.encode_ordinary
        self.vocab_size = max(*ids.values(), *special.values()) + 1
        self.eod = special[self._known.eod]
        self.sha256 = base.digest(f"TikTokenizer {name}", content)
        self._ids = ids
        self._content = content

    def parse_special_tokens(self) -> None:
        """From now on, take the text of a special token for that token."""
        self._encode = lambda text: self._encoding.encode(text, allowed_special="all")
        self.reserved_texts = tuple(self._known.special)

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        """Encode texts."""
        base.refuse_surrogates(texts)  # tiktoken would replace them
        return base.pack_ids(map(self._ids_of_text, texts))

    def _ids_of_text(self, text: str) -> list[int]:
        return list(chain.from_iterable(map(self._encode, self.sections(text))))

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of these ids. Broken UTF-8 becomes the replacement character."""
        return self._encoding.decode([int(i) for i in ids if i != self.eod])

    def huggingface_files(self) -> dict[str, bytes]:
        """tokenizer.json with the same merges and pattern, its settings, and the file itself."""
        known = self._known
        text = tokenizer_json(self._ids, known.pattern, known.special, nfc=known.sections is nfc)
        settings = base.tokenizer_config("PreTrainedTokenizerFast", eos_token=known.eod)
        files = {"tokenizer.json": text, "tokenizer_config.json": settings}
        return files | {Path(self._path).name: self._content}

    def load_fast(self, gigatoken):
        """Load the file into gigatoken, without special tokens: their text is ordinary text."""
        if self._known.gigatoken is None:
            raise TokenizerError(f"gigatoken cannot load a file of {self._encoding.name} ranks")
        return gigatoken.Tokenizer.from_tiktoken(self._path, self._known.gigatoken, {})


def _find_encoding(content: bytes, path: str | Path) -> str:
    """The encoding of a published file, or that in a file's name. Raises TokenizerError."""
    published = PUBLISHED.get(hashlib.sha256(content).hexdigest())
    if published is not None:
        return published
    for name in IN_FILE_NAMES:
        if name in Path(path).name:
            return name
    raise TokenizerError(
        f"--tokenizer-model {path}: not a published file of ranks, and the file does not say how "
        f"text is split into words: give --tiktoken-pattern, one of {', '.join(ENCODINGS)}"
    )


def _read_ranks(content: bytes, path: str | Path) -> dict[bytes, int]:
    """The rank of each token, from either format of the file. Raises TokenizerError."""
    try:
        ranks = {
            base64.b64decode(token, validate=True): int(rank) for token, rank in _entries(content)
        }
    except (ValueError, TypeError, KeyError, binascii.Error):
        ranks = {}
    if any(bytes([byte]) not in ranks for byte in range(256)):
        raise TokenizerError(
            f"--tokenizer-model {path}: not a file of ranks (a token in base64 and its rank on "
            "each line, or as token_bytes and rank in a JSON list; all 256 bytes among them)"
        )
    return ranks


def _entries(content: bytes) -> Iterable[tuple]:
    """(token in base64, rank) of each entry."""
    if content.lstrip().startswith(b"["):
        return ((entry["token_bytes"], entry["rank"]) for entry in json.loads(content))
    return (line.split() for line in content.splitlines() if line)
