"""From a block of lines to arrays of token ids: the work of one preprocessing worker."""

import json
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from megalite.data.tokenizers import TextError, Tokenizer
from megalite.preprocess.inputs import Block

BOM = b"\xef\xbb\xbf"
"""UTF-8's byte order mark, which some programs write before the first line."""
CHECKED_CHARACTERS = 64
"""Minimum number of characters of a block's first text that the reference library encodes too; a
thousandth of the block when that is more."""


class EmptyTextError(TextError):
    """A blank line, or a text without a token: what --skip-empty leaves out."""

    def __init__(self, problem: str):
        super().__init__(f"{problem} (--skip-empty leaves it out)")


class BadLine(NamedTuple):
    """A line that is not a document."""

    number: int
    """Number of the line within its block, from 0."""
    reason: str
    is_empty: bool = False
    """Whether nothing else is wrong but that the line or a text in it is empty."""


class ParsedBlock(NamedTuple):
    """The texts of a block, and its bad lines."""

    lines: int
    texts: list[list[str]]
    """For each key, one text for each document."""
    bad: list[BadLine]


class EncodedDocuments(NamedTuple):
    """Documents to append to one dataset: the arguments of IndexedWriter.add_documents."""

    ids: np.ndarray
    """[tokens], in the dtype of the dataset."""
    lengths: np.ndarray
    """int32 [sequences]: tokens in each sequence."""
    sequences: np.ndarray | None
    """int32 [documents]: sequences in each document; None: one in each."""


class EncodedBlock(NamedTuple):
    """The documents and bad lines of a block, and the time that it took."""

    lines: int
    documents: int
    per_key: list[EncodedDocuments]
    bad: list[BadLine]
    empty: int
    """Lines that --skip-empty left out."""
    seconds: tuple[float, float, float]
    """To read, to parse, and to encode."""


def stored_dtype(vocab_size: int) -> np.dtype:
    """The dtype in which a dataset stores the ids of a vocabulary of this size."""
    return np.dtype("<u2" if vocab_size < 65500 else "<i4")


class TextReader:
    """Finds the texts in blocks: the values of `keys` in JSON lines, or all of a text file."""

    def __init__(self, keys: tuple[str, ...]):
        import msgspec

        self.keys = keys
        self._fields = [f"key{number}" for number in range(len(keys))]
        names = dict(zip(self._fields, keys))
        row = msgspec.defstruct("Row", [(field, str) for field in self._fields], rename=names)
        self._decode = msgspec.json.Decoder(row).decode
        self._decode_errors = (msgspec.MsgspecError, ValueError, RecursionError)

    def parse(self, data: bytes, is_text: bool) -> ParsedBlock:
        """The texts and bad lines of a block.

        Each line is judged by itself, independent of its neighbours: its bytes are UTF-8, and
        msgspec or else Python's json, which also accepts NaN, finds the texts.
        """
        if is_text:
            return self._parse_one_by_one([data], is_text)
        lines = data.removesuffix(b"\n").split(b"\n")
        # The fast path: every line of the block is a document.
        try:
            if not data.isascii():
                data.decode()
            rows = [*map(self._decode, lines)]
            texts = [[getattr(row, field) for row in rows] for field in self._fields]
            if all(map(all, texts)):
                return ParsedBlock(len(lines), texts, [])
        except self._decode_errors:
            pass
        # The slow path finds which lines are bad, and why.
        return self._parse_one_by_one(lines, is_text)

    def _parse_one_by_one(self, lines: list[bytes], is_text: bool) -> ParsedBlock:
        texts: list[list[str]] = [[] for _ in self.keys]
        bad = []
        for number, line in enumerate(lines):
            try:
                row = self._texts_of(line.removeprefix(BOM), is_text)
            except UnicodeDecodeError as error:
                byte = line[error.start]
                reason = f"not UTF-8: byte {byte:#04x} at column {error.start + 1}"
                bad.append(BadLine(number, reason))
            except UnicodeEncodeError:
                bad.append(BadLine(number, "half of a surrogate pair, which is not Unicode text"))
            except ValueError as error:
                bad.append(BadLine(number, str(error), isinstance(error, EmptyTextError)))
            else:
                for column, text in zip(texts, row):
                    column.append(text)
        return ParsedBlock(len(lines), texts, bad)

    def _texts_of(self, line: bytes, is_text: bool) -> list[str]:
        """The text of each key in a line, all of them encodable. Raises ValueError."""
        row = [line.decode()] if is_text else self._row(line)
        for text in row:
            text.encode()  # raises UnicodeEncodeError for a lone surrogate
        if not all(row):
            raise EmptyTextError("the text is empty")
        return row

    def _row(self, line: bytes) -> list[str]:
        """The text of each key in a JSON line. Raises ValueError with the reason."""
        decoded = line.decode()
        try:
            row = self._decode(line)
            return [getattr(row, field) for field in self._fields]
        except self._decode_errors:
            pass  # Python's json accepts a little more, and explains the rest better
        if not line.strip():
            raise EmptyTextError("the line is empty")
        row = _decode_with_python(decoded)
        if not isinstance(row, dict):
            raise ValueError(f"a JSON object is needed, not {type(row).__name__}")
        for key in self.keys:
            if not isinstance(row.get(key), str):
                found = f"no key {key!r}"
                if key in row:
                    found = f"{key!r} is {type(row[key]).__name__}, not text"
                raise ValueError(f"{found}; keys here: {', '.join(row) or 'none'}")
        return [row[key] for key in self.keys]


def _decode_with_python(line: str):
    """A JSON line as Python's json reads it. Raises ValueError with the reason."""
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        reason = f"invalid JSON: {error.msg} at column {error.colno}"
        start = line.strip()
        if start == "{" or start.startswith("["):
            reason += "; each line must hold one JSON object"
        raise ValueError(reason) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"JSON that cannot be read: {error}") from None


class Encoder:
    """Encodes blocks.

    Args:
        tokenizer: encodes batches of texts.
        keys: keys of the JSON objects whose values are texts.
        append_eod: end each document with the tokenizer's end-of-document token.
        split: splits a text into sentences; None: a document is one sequence.
        skip_empty: count blank lines and empty texts instead of reporting them as bad lines.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        keys: tuple[str, ...],
        append_eod: bool,
        split: Callable[[str], list[str]] | None,
        skip_empty: bool = False,
    ):
        self.tokenizer = tokenizer
        self.reader = TextReader(keys)
        self.split = split
        self.skip_empty = skip_empty
        self.eod = tokenizer.eod if append_eod else None
        self.dtype = stored_dtype(tokenizer.vocab_size)

    def __call__(self, block: Block) -> EncodedBlock:
        """Encode a block.

        Raises TokenizerError when a sampled text shows that the fast backend's ids are wrong.
        """
        start = time.perf_counter()
        data = block.read()
        read = time.perf_counter()
        parsed = self.reader.parse(data, block.is_text)
        parsed_at = time.perf_counter()
        # Compare the beginning of the first text with the reference library.
        if parsed.texts[0]:
            checked = max(CHECKED_CHARACTERS, len(data) // 1000)
            self.tokenizer.check([parsed.texts[0][0][:checked]])
        # Encode all documents at once; one by one if the tokenizer refuses any.
        try:
            per_key = list(map(self._encode, parsed.texts))
        except TextError:
            parsed = self._without_refused(parsed)
            per_key = list(map(self._encode, parsed.texts))
        # Separate what --skip-empty leaves out from bad lines.
        bad = parsed.bad
        if self.skip_empty:
            bad = [line for line in bad if not line.is_empty]
        seconds = (read - start, parsed_at - read, time.perf_counter() - parsed_at)
        return EncodedBlock(
            lines=parsed.lines,
            documents=len(parsed.texts[0]),
            per_key=per_key,
            bad=bad,
            empty=len(parsed.bad) - len(bad),
            seconds=seconds,
        )

    def _without_refused(self, parsed: ParsedBlock) -> ParsedBlock:
        """The block with the documents that the tokenizer cannot encode as bad lines."""
        numbers = sorted(set(range(parsed.lines)).difference(line.number for line in parsed.bad))
        texts: list[list[str]] = [[] for _ in parsed.texts]
        bad = list(parsed.bad)
        for number, row in zip(numbers, zip(*parsed.texts), strict=True):
            try:
                for text in row:
                    self._encode([text])
            except TextError as error:
                bad.append(BadLine(number, str(error), isinstance(error, EmptyTextError)))
            else:
                for column, text in zip(texts, row):
                    column.append(text)
        return ParsedBlock(parsed.lines, texts, sorted(bad))

    def _encode(self, texts: list[str]) -> EncodedDocuments:
        """The ids of documents. Raises TextError for a text that the tokenizer has no ids for."""
        counts = None
        if self.split is not None:
            texts, counts = self._sentences_of(texts)
        ids, lengths = self.tokenizer.encode_batch(texts)
        ids = ids.astype(self.dtype, copy=False)
        if not texts:
            return EncodedDocuments(ids, lengths.astype("<i4"), counts)
        # The first and the last sequence of each document.
        if counts is None:
            last = first = np.arange(len(lengths))
        else:
            last = np.cumsum(counts) - 1
            first = last - counts + 1
        if not np.add.reduceat(lengths, first).all():
            raise EmptyTextError("the text gives no tokens")
        if self.eod is not None:
            ids = np.insert(ids, np.cumsum(lengths)[last], self.eod)
            lengths = lengths.copy()
            lengths[last] += 1
        return EncodedDocuments(ids, lengths.astype("<i4"), counts)

    def _sentences_of(self, texts: list[str]) -> tuple[list[str], np.ndarray]:
        """The sentences of all texts, and int32 [texts] the number of sentences in each."""
        sentences = []
        counts = np.empty(len(texts), "<i4")
        for number, text in enumerate(texts):
            found = [s for s in map(str.strip, self.split(text)) if s]
            sentences += found or [text]
            counts[number] = len(found) or 1
        return sentences, counts
