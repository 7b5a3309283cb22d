"""What every tokenizer is: the interface, its arrays, its errors."""

import hashlib
import importlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, Protocol

import numpy as np


class TokenizerError(ValueError):
    """A tokenizer that cannot be built, trained or asked this: says what to do."""


class TextError(TokenizerError):
    """A text that a tokenizer has no ids for."""


class Encoded(NamedTuple):
    """The ids of several texts, one after another."""

    ids: np.ndarray
    """Ids of all texts, integers [sum of lengths]."""
    lengths: np.ndarray
    """int64 [texts]: ids of each text."""

    def split(self) -> list[np.ndarray]:
        """The ids of each text."""
        return np.split(self.ids, np.cumsum(self.lengths)[:-1]) if len(self.lengths) else []


def encoded(ids: Iterable[Sequence[int] | np.ndarray], dtype=np.int32) -> Encoded:
    """The ids of each text, gathered."""
    arrays = [np.asarray(text, dtype) for text in ids]
    lengths = np.array([len(text) for text in arrays], np.int64)
    return Encoded(np.concatenate([np.empty(0, dtype), *arrays]), lengths)


class Tokenizer(Protocol):
    """What megalite asks of a tokenizer."""

    vocab_size: int
    """Every id is below this."""
    sha256: str
    """Digest of what makes the ids; equal digests give equal ids, whatever the backend."""
    backend: str
    """Who encodes: reference or fast."""
    why: str
    """Why the backend is not the fast one, if that was asked for; else empty."""

    @property
    def eod(self) -> int:
        """Id of the end-of-document token. Raises TokenizerError when there is none."""

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        """Ids of each text, without the end-of-document token. Special tokens are ordinary text here.

        Raises UnicodeEncodeError for a text with lone surrogates, which is no Unicode text, and TextError for one
        that this kind of tokenizer has no ids for.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these ids; an end-of-document token gives none."""

    def check(self, texts: Sequence[str]) -> None:
        """Compare the backend's ids of these texts with the reference's. Raises TokenizerError where they differ."""


class ReferenceTokenizer:
    """A tokenizer that encodes by the library that defines its ids: nothing to compare it with."""

    backend = "reference"
    why = ""
    marks: tuple[str, ...] = ()
    """Texts with one of these in them are left to the reference: the fast library takes them for special tokens."""

    def check(self, texts: Sequence[str]) -> None:
        """Nothing: these are the reference's ids."""

    def load_fast(self, gigatoken: ModuleType):
        """The same tokenizer as a gigatoken.Tokenizer. Raises an Exception that says why it cannot be."""
        raise TokenizerError("gigatoken has no such kind")


def digest(kind: str, *contents: bytes) -> str:
    """SHA-256 of a kind and the contents of its files."""
    total = hashlib.sha256(kind.encode())
    for content in contents:
        total.update(hashlib.sha256(content).digest())
    return total.hexdigest()


def library(name: str, kind: str) -> ModuleType:
    """An optional library. Raises TokenizerError with the command that installs it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise TokenizerError(f"{kind} needs the {name} library: pip install {name}") from None


def read(path: str | Path, flag: str) -> bytes:
    """The content of a tokenizer's file. Raises TokenizerError when there is none."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        reason = "no such file. tools/train_tokenizer.py makes one" if missing else error.strerror
        raise TokenizerError(f"{flag} {path}: {reason}") from None


def refuse_surrogates(texts: Sequence[str]) -> None:
    """Raise UnicodeEncodeError for the first text that is no Unicode text, TypeError for one that is no text."""
    for text in texts:
        str.encode(text)


def shortened(text: str, width: int = 60) -> str:
    """A text as Python writes it, its beginning only if it is long."""
    return repr(text) if len(text) <= width else f"{text[:width]!r}..."
