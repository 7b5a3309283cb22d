"""Tokenizers behind one small interface, and training a SentencePiece model. Libraries are imported where used."""

import hashlib
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np


class TokenizerError(ValueError):
    """A tokenizer that cannot be built, trained or asked this: says what to do."""


class Encoded(NamedTuple):
    """The ids of several texts, one after another."""

    ids: np.ndarray
    """Ids of all texts, integers [sum of lengths]."""
    lengths: np.ndarray
    """int64 [texts]: ids of each text."""

    def split(self) -> list[np.ndarray]:
        """The ids of each text."""
        return np.split(self.ids, np.cumsum(self.lengths)[:-1]) if len(self.lengths) else []


def encoded(ids: Sequence[np.ndarray]) -> Encoded:
    """The ids of each text, gathered."""
    lengths = np.array([len(text) for text in ids], np.int64)
    return Encoded(np.concatenate([np.empty(0, np.int32), *ids]), lengths)


class Tokenizer(Protocol):
    """What megalite asks of a tokenizer."""

    vocab_size: int
    """Every id is below this."""
    sha256: str
    """Digest of what makes the ids; equal digests give equal ids."""

    @property
    def eod(self) -> int:
        """Id of the end-of-document token. Raises TokenizerError when there is none."""

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        """Ids of each text, without the end-of-document token.

        Raises UnicodeEncodeError for a text with lone surrogates, which is no Unicode text.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these ids; an end-of-document token gives none."""


class ByteTokenizer:
    """UTF-8 bytes as ids 0 to 255, and 256 for the end of a document."""

    vocab_size = 257
    eod = 256
    sha256 = hashlib.sha256(b"ByteTokenizer").hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        """The bytes of each text."""
        return encoded([np.frombuffer(text.encode(), np.uint8) for text in texts])

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these bytes; broken UTF-8 becomes the replacement character."""
        return bytes(i for i in map(int, ids) if i < 256).decode(errors="replace")


class SentencePieceTokenizer:
    """A SentencePiece model; its end-of-sentence piece ends documents.

    Raises TokenizerError when the library or the file is missing, or the file is no model.
    """

    def __init__(self, path: str | Path):
        sentencepiece = _import_sentencepiece()
        path = Path(path)
        if not path.is_file():
            raise TokenizerError(f"--tokenizer-model {path}: no such file. tools/train_tokenizer.py makes one")
        data = path.read_bytes()
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=data)
        except RuntimeError:
            raise TokenizerError(f"--tokenizer-model {path}: not a SentencePiece model") from None
        self._path = path
        self.vocab_size = self._processor.get_piece_size()
        self.sha256 = hashlib.sha256(data).hexdigest()

    @property
    def eod(self) -> int:
        """Id of the end-of-sentence piece. Raises TokenizerError when the model was trained without one."""
        eos = self._processor.eos_id()
        if eos < 0:
            raise TokenizerError(
                f"{self._path}: the model has no end-of-sentence piece to end documents with; train it with an eos_id"
            )
        return eos

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        """Ids of each text."""
        data = [text.encode() for text in texts]
        return encoded([np.array(ids, np.int32) for ids in self._processor.encode(data, num_threads=1)])

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these ids; control pieces give none."""
        return self._processor.decode([int(i) for i in ids])


def build_tokenizer(tokenizer_type: str, tokenizer_model: str | None = None) -> Tokenizer:
    """The tokenizer of --tokenizer-type and --tokenizer-model. Raises TokenizerError when they do not fit together."""
    if tokenizer_type == "ByteTokenizer":
        if tokenizer_model is not None:
            raise TokenizerError(f"--tokenizer-model {tokenizer_model}: ByteTokenizer has no model; leave the flag out")
        return ByteTokenizer()
    if tokenizer_type == "SentencePieceTokenizer":
        if tokenizer_model is None:
            raise TokenizerError("--tokenizer-type SentencePieceTokenizer needs --tokenizer-model FILE.model")
        return SentencePieceTokenizer(tokenizer_model)
    raise TokenizerError(f"--tokenizer-type {tokenizer_type}: known are SentencePieceTokenizer and ByteTokenizer")


def train_sentencepiece(texts: Iterable[str], vocab_size: int) -> bytes:
    """Train a SentencePiece BPE model: the content of a .model file, the same for the same texts.

    Decoding gives back the text that was encoded, white space and line breaks included: nothing is normalised, and
    what the vocabulary lacks is spelt in bytes. (One exception: U+2581, SentencePiece's own sign for a space, comes
    back as a space.) Ids: 0 unknown, 1 begin, 2 end of document, 3 padding, then 256 bytes, then pieces.
    Raises TokenizerError when the texts do not give this many pieces, or are empty.
    """
    sentencepiece = _import_sentencepiece()
    lines = _Lines(texts)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            max_sentence_length=1 << 30,
            num_threads=1,
            minloglevel=3,
        )
    except RuntimeError as error:
        lines.reraise()
        if lines.count == 0:
            raise TokenizerError("no text to train a tokenizer on: the input is empty") from None
        reason = str(error).rsplit("] ", 1)[-1].strip()
        raise TokenizerError(f"--vocab-size {vocab_size} does not fit this text: {reason or error}") from None
    lines.reraise()
    return model.getvalue()


class _Lines:
    """The lines of texts. Remembers the error that ends them early, since SentencePiece drops it."""

    def __init__(self, texts: Iterable[str]):
        self._texts = texts
        self._error: Exception | None = None
        self.count = 0

    def __iter__(self) -> Iterator[str]:
        try:
            for text in self._texts:
                for line in filter(None, text.split("\n")):
                    self.count += 1
                    yield line
        except Exception as error:
            self._error = error
            raise

    def reraise(self) -> None:
        if self._error is not None:
            raise self._error


def _import_sentencepiece():
    try:
        import sentencepiece
    except ImportError:
        raise TokenizerError(
            "SentencePieceTokenizer needs the sentencepiece library: pip install sentencepiece"
        ) from None
    return sentencepiece
