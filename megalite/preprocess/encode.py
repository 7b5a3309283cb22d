"""From a block of lines to the bytes of its ids: what a preprocessing worker does."""

import json
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from megalite.data.tokenizers import TextError, Tokenizer
from megalite.preprocess.inputs import Block

BOM = b"\xef\xbb\xbf"
"""What some programs write before the first line."""
EXCERPT = 64
"""The least characters of the first text of a block that the reference library encodes too; a thousandth of the block
when that is more."""


class Lines(NamedTuple):
    """Of each JSON key, or of each sentence split of it: what is appended to its dataset."""

    ids: np.ndarray
    """In the dtype of the dataset."""
    lengths: np.ndarray
    """int32, of each sequence."""
    sequences: np.ndarray | None
    """int32, sequences in each document; None: one in each."""


class EncodedBlock(NamedTuple):
    """A block's documents, its bad lines, and where the time went."""

    lines: int
    documents: int
    per_key: list[Lines]
    bad: list[tuple[int, str]]
    """(line within the block, from 0; what is wrong with it)"""
    seconds: tuple[float, float, float]
    """To read, to parse, to encode."""


class TextReader:
    """Finds the texts in blocks: the values of `keys` in JSON lines, or all of a text file."""

    def __init__(self, keys: tuple[str, ...]):
        import msgspec

        self.keys = keys
        self._fields = [f"key{number}" for number in range(len(keys))]
        names = dict(zip(self._fields, keys))
        row = msgspec.defstruct("Row", [(field, str) for field in self._fields], rename=names)
        self._decode = msgspec.json.Decoder(row).decode
        self._refusals = (msgspec.MsgspecError, ValueError, RecursionError)

    def parse(
        self, data: bytes, is_text: bool
    ) -> tuple[int, list[list[str]], list[tuple[int, str]]]:
        """(number of lines, the texts of each key, bad lines)

        A line is judged by itself, whatever stands beside it: its bytes are UTF-8, and msgspec or else Python's json,
        which also takes NaN, finds the texts.
        """
        lines = [data] if is_text else data.removesuffix(b"\n").split(b"\n")
        if not is_text:
            try:
                if not data.isascii():
                    data.decode()
                rows = [*map(self._decode, lines)]
                texts = [[getattr(row, field) for row in rows] for field in self._fields]
                if all(map(all, texts)):
                    return len(lines), texts, []
            except self._refusals:
                pass  # now which lines, and why
        return self._parse_one_by_one(lines, is_text)

    def _parse_one_by_one(self, lines: list[bytes], is_text: bool):
        texts, bad = [[] for _ in self.keys], []
        for number, line in enumerate(lines):
            try:
                row = (
                    [line.removeprefix(BOM).decode()]
                    if is_text
                    else self._row(line.removeprefix(BOM))
                )
                for text in row:
                    text.encode()
                if not all(row):
                    raise ValueError("the text is empty")
            except UnicodeDecodeError as error:
                bad.append(
                    (
                        number,
                        f"not UTF-8: byte {line[error.start]:#04x} at column {error.start + 1}",
                    )
                )
            except UnicodeEncodeError:
                bad.append((number, "half of a surrogate pair, no Unicode text"))
            except ValueError as error:
                bad.append((number, str(error)))
            else:
                for column, text in zip(texts, row):
                    column.append(text)
        return len(lines), texts, bad

    def _row(self, line: bytes) -> list[str]:
        """The texts of one line. Raises ValueError with what is wrong."""
        decoded = line.decode()
        try:
            row = self._decode(line)
            return [getattr(row, field) for field in self._fields]
        except self._refusals:
            pass  # Python's json takes a little more, and says more about the rest
        try:
            row = json.loads(decoded)
        except json.JSONDecodeError as error:
            start = line.strip()
            several = (
                "; each line must hold one JSON object"
                if start == b"{" or start.startswith(b"[")
                else ""
            )
            reason = (
                f"invalid JSON: {error.msg} at column {error.colno}{several}"
                if start
                else "the line is empty"
            )
            raise ValueError(reason) from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"JSON that cannot be read: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"a JSON object is needed, not {type(row).__name__}")
        for key in self.keys:
            if not isinstance(row.get(key), str):
                found = (
                    f"{key!r} is {type(row[key]).__name__}, not text"
                    if key in row
                    else f"no key {key!r}"
                )
                raise ValueError(f"{found}; keys here: {', '.join(row) or 'none'}")
        return [row[key] for key in self.keys]


class Encoder:
    """Encodes blocks.

    Args:
        tokenizer: encodes batches of texts.
        keys: of the JSON objects.
        append_eod: end each document with the tokenizer's end-of-document token.
        split: splits a text into sentences; None: a document is one sequence.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        keys: tuple[str, ...],
        append_eod: bool,
        split: Callable[[str], list[str]] | None,
    ):
        self.tokenizer, self.reader, self.split = tokenizer, TextReader(keys), split
        self.eod = tokenizer.eod if append_eod else None
        self.dtype = np.dtype("<u2" if tokenizer.vocab_size < 65500 else "<i4")

    def __call__(self, block: Block) -> EncodedBlock:
        """Encode a block. Raises TokenizerError when a sampled text shows that the fast tokenizer is wrong."""
        began = time.perf_counter()
        data = block.read()
        read = time.perf_counter()
        lines, texts, bad = self.reader.parse(data, block.is_text)
        parsed = time.perf_counter()
        if texts[0]:
            self.tokenizer.check([texts[0][0][: max(EXCERPT, len(data) // 1000)]])
        try:
            per_key = [self._encode(column) for column in texts]
        except TextError:
            texts, bad = self._without_refused(lines, texts, bad)
            per_key = [self._encode(column) for column in texts]
        seconds = read - began, parsed - read, time.perf_counter() - parsed
        return EncodedBlock(lines, len(texts[0]), per_key, bad, seconds)

    def _without_refused(self, lines: int, texts: list[list[str]], bad: list[tuple[int, str]]):
        """(texts, bad lines): documents that the tokenizer cannot encode become bad lines."""
        already = {number for number, _ in bad}
        numbers = [number for number in range(lines) if number not in already]
        kept, refused = [], []
        for number, row in zip(numbers, zip(*texts), strict=True):
            try:
                for text in row:
                    self._encode([text])
                kept.append(row)
            except TextError as error:
                refused.append((number, str(error)))
        return [[row[key] for row in kept] for key in range(len(texts))], sorted(bad + refused)

    def _encode(self, texts: list[str]) -> Lines:
        """Raises TextError for a text that the tokenizer has no ids for."""
        counts = None
        if self.split is not None:
            sentences = [
                [s for s in map(str.strip, self.split(text)) if s] or [text] for text in texts
            ]
            counts = np.array([len(found) for found in sentences], "<i4")
            texts = [sentence for found in sentences for sentence in found]
        ids, lengths = self.tokenizer.encode_batch(texts)
        ids = ids.astype(self.dtype, copy=False)
        starts = None if counts is None else np.cumsum(counts) - counts
        if texts and not (lengths if starts is None else np.add.reduceat(lengths, starts)).all():
            raise TextError("the text gives no tokens")
        if self.eod is not None and texts:
            last = np.arange(len(lengths)) if starts is None else starts + counts - 1
            ids = np.insert(ids, np.cumsum(lengths)[last], self.eod)
            lengths = lengths.copy()
            lengths[last] += 1
        return Lines(ids, lengths.astype("<i4"), counts)
