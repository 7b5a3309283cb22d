"""The interface of a tokenizer, the arrays it returns, and its errors."""

import hashlib
import importlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np

from megalite.system.errors import ReportedError, explain_os_error


class TokenizerError(ReportedError, ValueError):
    """A tokenizer cannot be built or trained, or lacks what is asked for. Says what to do."""


class TextError(TokenizerError):
    """A text that a tokenizer has no ids for."""


class Encoded(NamedTuple):
    """The ids of several texts in one array."""

    ids: np.ndarray
    """Ids of all texts, one text after another: integers [sum of lengths]."""
    lengths: np.ndarray
    """Number of ids of each text: int64 [texts]."""

    def split(self) -> list[np.ndarray]:
        """Return one array of ids for each text."""
        if len(self.lengths) == 0:
            return []
        return np.split(self.ids, np.cumsum(self.lengths)[:-1])


def pack_ids(ids: Iterable[Sequence[int] | np.ndarray], dtype=np.int32) -> Encoded:
    """Pack the ids of each text into one `Encoded`."""
    arrays = [np.asarray(text, dtype) for text in ids]
    lengths = np.array(list(map(len, arrays)), np.int64)
    return Encoded(np.concatenate([np.empty(0, dtype), *arrays]), lengths)


class Tokenizer:
    """What megalite asks of a tokenizer; it encodes with the library that defines its ids."""

    vocab_size: int
    """Every id is below this."""
    sha256: str
    """Digest of the files and settings that determine the ids, whatever the backend."""
    eod: int
    """Id of the end-of-document token. A property may raise TokenizerError if there is none."""
    backend = "reference"
    """Who encodes: reference or fast."""
    why = ""
    """Why --tokenizer-backend auto did not choose the fast backend; else empty."""
    reserved_texts: tuple[str, ...] = ()
    """The fast backend leaves texts that contain one of these strings to the reference library:
    gigatoken would take them for special tokens, or would not when it should."""

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        """Encode texts, without an end-of-document token.

        The text of a special token is ordinary text, unless the tokenizer was built with
        parse_special_tokens. Raises UnicodeEncodeError for a text with lone surrogates, and
        TextError for a text that the tokenizer has no ids for.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of these ids. The end-of-document token has no text."""

    def check(self, texts: Sequence[str]) -> None:
        """Compare the ids of the fast backend with those of the reference library.

        Raises TokenizerError with the first text for which they differ.
        """

    @property
    def eod_or_none(self) -> int | None:
        """Id of the end-of-document token; None if there is none."""
        try:
            return self.eod
        except TokenizerError:
            return None

    def sections(self, text: str) -> list[str]:
        """Return the strings that are encoded in place of `text`; their ids are concatenated."""
        return [text]

    def huggingface_files(self) -> dict[str, bytes]:
        """The files, by name, from which AutoTokenizer of the transformers library makes the same
        tokenizer. Raises TokenizerError that says why there are none."""
        raise TokenizerError(f"transformers knows no {type(self).__name__}")

    def load_fast(self, gigatoken: ModuleType):
        """Return the same tokenizer as a gigatoken.Tokenizer.

        Raises an Exception that says why gigatoken cannot load it.
        """
        raise TokenizerError("gigatoken has no such kind")


def tokenizer_config(kind: str, **values: object) -> bytes:
    """The content of a tokenizer_config.json: the class of transformers, and its settings."""
    content = {"tokenizer_class": kind, "clean_up_tokenization_spaces": False, **values}
    return json.dumps(content, indent=2).encode()


def digest(kind: str, *contents: bytes) -> str:
    """SHA-256, in hex, of the kind of a tokenizer and the contents of its files."""
    total = hashlib.sha256(kind.encode())
    for content in contents:
        total.update(hashlib.sha256(content).digest())
    return total.hexdigest()


def import_library(name: str, kind: str) -> ModuleType:
    """Import an optional library. Raises TokenizerError with the command that installs it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise TokenizerError(f"{kind} needs the {name} library: pip install {name}") from None


def read_file(path: str | Path, flag: str) -> bytes:
    """Read a file of a tokenizer, named by `flag`. Raises TokenizerError if it cannot be read."""
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise TokenizerError(missing_file(flag, path)) from None
    except OSError as error:
        raise TokenizerError(f"{flag} {explain_os_error(error)}") from None


def missing_file(flag: str, path: str | Path) -> str:
    """The message for a tokenizer's file that does not exist."""
    return f"{flag} {path}: no such file. tools/train_tokenizer.py makes one"


def refuse_surrogates(texts: Sequence[str]) -> None:
    """Raise UnicodeEncodeError if a text has lone surrogates, TypeError if one is not a str."""
    for text in texts:
        str.encode(text)


def shortened(text: str, width: int = 60) -> str:
    """The repr of a text; of a text longer than `width`, the repr of its beginning."""
    if len(text) <= width:
        return repr(text)
    return f"{text[:width]!r}..."
