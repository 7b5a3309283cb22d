"""From a block of lines to the bytes of its ids: what a preprocessing worker does."""

import json
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from megalite.data.inputs import Block
from megalite.data.tokenizers import Tokenizer

EXCERPT = 1000
"""Characters of the first text of a block that the reference library encodes too: about a thousandth of the input."""


class Lines(NamedTuple):
    """Of each JSON key, or of each sentence split of it: what is appended to its dataset."""

    ids: bytes
    """In the dtype of the dataset."""
    lengths: bytes
    """int32, of each sequence."""
    sequences: bytes
    """int32, sequences in each document; empty: one in each."""


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
        self._decoder, self._errors = msgspec.json.Decoder(row), (msgspec.MsgspecError, UnicodeError)

    def parse(self, data: bytes, is_text: bool) -> tuple[int, list[list[str]], list[tuple[int, str]]]:
        """(number of lines, the texts of each key, bad lines)"""
        if is_text:
            lines = [data]
        else:
            count = data.count(b"\n") + (not data.endswith(b"\n"))
            try:
                rows = self._decoder.decode_lines(data)
            except self._errors:
                rows = []
            # One line may hold two objects, or two lines one: then the count tells, and lines are read one by one.
            if len(rows) == count:
                texts = [[getattr(row, field) for row in rows] for field in self._fields]
                if all(map(all, texts)):
                    return count, texts, []
            lines = data.removesuffix(b"\n").split(b"\n")
        texts, bad = [[] for _ in self.keys], []
        for number, line in enumerate(lines):
            try:
                row = [line.decode()] if is_text else self._row(line)
                for text in row:
                    text.encode()
                if not all(row):
                    raise ValueError("the text is empty")
            except UnicodeDecodeError as error:
                bad.append((number, f"not UTF-8: byte {line[error.start]:#04x} at column {error.start + 1}"))
            except UnicodeEncodeError:
                bad.append((number, "half of a surrogate pair, no Unicode text"))
            except (ValueError, RecursionError) as error:
                bad.append((number, str(error)))
            else:
                for column, text in zip(texts, row):
                    column.append(text)
        return len(lines), texts, bad

    def _row(self, line: bytes) -> list[str]:
        """The texts of one line. Raises ValueError with what is wrong."""
        try:
            row = json.loads(line.decode())
        except json.JSONDecodeError as error:
            reason = f"invalid JSON: {error.msg} at column {error.colno}" if line.strip() else "the line is empty"
            raise ValueError(reason) from None
        except UnicodeDecodeError:
            raise
        except (ValueError, RecursionError) as error:
            raise ValueError(f"JSON that cannot be read: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"a JSON object is needed, not {type(row).__name__}")
        for key in self.keys:
            if not isinstance(row.get(key), str):
                found = f"{key!r} is {type(row[key]).__name__}, not text" if key in row else f"no key {key!r}"
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
        self, tokenizer: Tokenizer, keys: tuple[str, ...], append_eod: bool, split: Callable[[str], list[str]] | None
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
            self.tokenizer.check([texts[0][0][:EXCERPT]])
        per_key = [self._encode(column) for column in texts]
        seconds = read - began, parsed - read, time.perf_counter() - parsed
        return EncodedBlock(lines, len(texts[0]), per_key, bad, seconds)

    def _encode(self, texts: list[str]) -> Lines:
        documents = None
        if self.split is not None:
            sentences = [[s for s in map(str.strip, self.split(text)) if s] or [text] for text in texts]
            documents = np.array([len(found) for found in sentences], "<i4")
            texts = [sentence for found in sentences for sentence in found]
        ids, lengths = self.tokenizer.encode_batch(texts)
        if self.eod is None:
            stored = ids.astype(self.dtype)
        else:
            last = np.arange(len(lengths)) if documents is None else np.cumsum(documents) - 1
            ends = np.cumsum(lengths)[last]  # where an end of document goes
            stored = (
                np.insert(ids.astype(self.dtype, copy=False), ends, self.eod) if len(ends) else ids.astype(self.dtype)
            )
            lengths = lengths.copy()
            lengths[last] += 1
        counts = b"" if documents is None else documents.tobytes()
        return Lines(stored.tobytes(), lengths.astype("<i4").tobytes(), counts)
