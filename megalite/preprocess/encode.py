"""From a block of lines to arrays of token ids: the work of one preprocessing worker."""

import time
from collections.abc import Iterable, Sequence
from functools import partial
from typing import NamedTuple

import msgspec
import numpy as np
from msgspec.structs import astuple

from megalite.data.json_lines import json_object, text_problem
from megalite.data.tokenizers import TextError
from megalite.preprocess.config import PreprocessConfig
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
    sequences: np.ndarray
    """int32 [documents]: sequences in each document."""


class EncodedBlock(NamedTuple):
    """The documents and bad lines of a block, and the time that it took."""

    lines: int
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
        self.keys = keys
        fields = [f"key{number}" for number in range(len(keys))]
        types = zip(fields, [str] * len(keys))
        row = msgspec.defstruct("Row", types, rename=dict(zip(fields, keys)))
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
            texts = _columns(map(astuple, map(self._decode, lines)), len(self.keys))
            if all(map(all, texts)):
                return ParsedBlock(len(lines), texts, [])
        except self._decode_errors:
            pass
        # The slow path finds which lines are bad, and why.
        return self._parse_one_by_one(lines, is_text)

    def _parse_one_by_one(self, lines: list[bytes], is_text: bool) -> ParsedBlock:
        rows = []
        bad = []
        for number, line in enumerate(lines):
            try:
                rows.append(self._texts_of(line.removeprefix(BOM), is_text))
            except UnicodeDecodeError as error:
                byte = line[error.start]
                reason = f"not UTF-8: byte {byte:#04x} at column {error.start + 1}"
                bad.append(BadLine(number, reason))
            except UnicodeEncodeError:
                bad.append(BadLine(number, "half of a surrogate pair, which is not Unicode text"))
            except ValueError as error:
                bad.append(BadLine(number, str(error), isinstance(error, EmptyTextError)))
        return ParsedBlock(len(lines), _columns(rows, len(self.keys)), bad)

    def _texts_of(self, line: bytes, is_text: bool) -> Sequence[str]:
        """The text of each key in a line, all of them encodable. Raises ValueError."""
        row = [line.decode()] if is_text else self._row(line)
        "".join(row).encode()  # raises UnicodeEncodeError for a lone surrogate
        if not all(row):
            raise EmptyTextError("the text is empty")
        return row

    def _row(self, line: bytes) -> Sequence[str]:
        """The text of each key in a JSON line. Raises ValueError with the reason."""
        decoded = line.decode()
        try:
            return astuple(self._decode(line))
        except self._decode_errors:
            pass  # Python's json accepts a little more, and explains the rest better
        if not line.strip():
            raise EmptyTextError("the line is empty")
        row = json_object(decoded)
        for key in self.keys:
            if problem := text_problem(row, key):
                raise ValueError(problem)
        return list(map(row.get, self.keys))


def _columns(rows: Iterable[Sequence[str]], count: int) -> list[list[str]]:
    """The texts of each of `count` keys, from those of each document."""
    return list(map(list, zip(*rows))) or [[] for _ in range(count)]


class Encoder:
    """Encodes blocks as configured. Raises TokenizerError."""

    def __init__(self, config: PreprocessConfig):
        self.config = config
        self.tokenizer = config.tokenizer
        self.reader = TextReader(config.json_keys)
        self.eod = self.tokenizer.eod if config.append_eod else None
        self.dtype = stored_dtype(self.tokenizer.vocab_size)
        if config.split_sentences:
            from sentencex import segment

            self.split = partial(segment, config.language)

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
        if self.config.skip_empty:
            bad = [line for line in bad if not line.is_empty]
        empty = len(parsed.bad) - len(bad)
        seconds = (read - start, parsed_at - read, time.perf_counter() - parsed_at)
        return EncodedBlock(parsed.lines, per_key, bad, empty=empty, seconds=seconds)

    def _without_refused(self, parsed: ParsedBlock) -> ParsedBlock:
        """The block with the documents that the tokenizer cannot encode as bad lines."""
        numbers = sorted(set(range(parsed.lines)).difference(line.number for line in parsed.bad))
        rows = []
        bad = list(parsed.bad)
        for number, row in zip(numbers, zip(*parsed.texts), strict=True):
            try:
                for text in row:
                    self._encode([text])
                rows.append(row)
            except TextError as error:
                bad.append(BadLine(number, str(error), isinstance(error, EmptyTextError)))
        return ParsedBlock(parsed.lines, _columns(rows, len(parsed.texts)), sorted(bad))

    def _encode(self, texts: list[str]) -> EncodedDocuments:
        """The ids of documents. Raises TextError for a text that the tokenizer has no ids for."""
        counts = np.ones(len(texts), "<i4")
        if self.config.split_sentences:
            texts, counts = self._sentences_of(texts)
        ids, lengths = self.tokenizer.encode_batch(texts)
        ids = ids.astype(self.dtype, copy=False)
        # The first and the last sequence of each document.
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
