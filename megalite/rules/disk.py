"""Quick looks at data sets and checkpoint folders: a few reads, whatever their size. Imports no torch."""

import difflib
import os
import re
from dataclasses import dataclass
from typing import BinaryIO

MAKE_DATA = "make it with tools/preprocess_data.py"
SHOWN_NAMES = 5
"""Names listed when a file is not there."""


@dataclass(frozen=True)
class DatasetPeek:
    """What the header of PREFIX.idx and the size of PREFIX.bin tell."""

    prefix: str
    itemsize: int
    largest_id: int
    """Largest id that the numbers in the .bin file can hold."""
    sequences: int
    documents: int
    bin_size: int

    @classmethod
    def open(cls, prefix: str) -> "DatasetPeek":
        """Raises DatasetError when the files do not fit together, OSError when one cannot be read."""
        import numpy as np

        from megalite.data.indexed import DTYPES, HEADER, MAGIC, VERSION, DatasetError

        size, bin_size = os.path.getsize(prefix + ".idx"), os.path.getsize(prefix + ".bin")
        with open(prefix + ".idx", "rb") as file:
            header = file.read(HEADER.size)
        if len(header) < HEADER.size or header[: len(MAGIC)] != MAGIC:
            raise DatasetError(f"{prefix}.idx is no MMIDIDX file")
        _, version, code, sequences, boundaries = HEADER.unpack(header)
        dtype = np.dtype(DTYPES.get(code, "f4"))
        if version != VERSION or dtype.kind == "f":
            raise DatasetError(f"{prefix}.idx has version {version} and dtype code {code}; 1 and 1-5 or 8 can be read")
        needed = HEADER.size + 12 * sequences + 8 * boundaries
        if size not in (needed, needed + sequences) or boundaries < 1:
            raise DatasetError(f"{prefix}.idx has {size} bytes where {needed} are needed: damaged or cut short")
        peek = cls(prefix, dtype.itemsize, int(np.iinfo(dtype).max), sequences, boundaries - 1, bin_size)
        with open(prefix + ".idx", "rb") as file:
            end = peek._sequence_end(file)
        if end > bin_size:
            raise DatasetError(f"{prefix}.bin has {bin_size} bytes where {end} are needed: damaged or cut short")
        return peek

    def split_tokens(self, split: str) -> dict[str, int]:
        """Tokens of each split, of a dataset whose sequences lie one after another (as preprocessing writes them); {}
        where they do not, and only reading all of the index would tell. Raises DatasetError for an unreadable split."""
        from megalite.data.gpt import split_documents

        with open(self.prefix + ".idx", "rb") as file:
            starts = [self._document_start(file, document) for document in (0, self.documents)]
            if starts != [0, self.bin_size]:
                return {}
            return {
                name: (self._document_start(file, last) - self._document_start(file, first)) // self.itemsize
                for name, (first, last) in split_documents(split, self.documents).items()
            }

    def _document_start(self, file: BinaryIO, document: int) -> int:
        """Byte of the .bin file at which a document starts."""
        sequence = self._number(file, 12 * self.sequences + 8 * document, 8)
        return self._number(file, 4 * self.sequences + 8 * sequence, 8) if sequence < self.sequences else self.bin_size

    def _sequence_end(self, file: BinaryIO) -> int:
        """Byte of the .bin file at which the last sequence ends."""
        if self.sequences == 0:
            return 0
        length = self._number(file, 4 * (self.sequences - 1), 4)
        return self._number(file, 4 * self.sequences + 8 * (self.sequences - 1), 8) + length * self.itemsize

    def _number(self, file: BinaryIO, offset: int, size: int) -> int:
        from megalite.data.indexed import HEADER

        file.seek(HEADER.size + offset)
        return int.from_bytes(file.read(size), "little", signed=True)


def stored_iterations(folder: str) -> list[int]:
    """Iterations with a complete checkpoint in a folder, ascending; one that was being replaced counts too."""
    pattern = re.compile(r"iter_(\d{7,})(\.replaced-\d+)?")
    found = {
        int(match[1])
        for name in listing(folder)
        if (match := pattern.fullmatch(name)) and os.path.isfile(os.path.join(folder, name, "index.json"))
    }
    return sorted(found)


def same_place(one: str | None, other: str | None) -> bool:
    """Whether two paths lead to the same place, which need not exist."""
    return one is not None and other is not None and os.path.realpath(one) == os.path.realpath(other)


def listing(folder: str) -> list[str]:
    """Names in a folder, sorted; [] when it cannot be read."""
    try:
        return sorted(os.listdir(folder or "."))
    except OSError:
        return []


def neighbours(path: str, suffix: str) -> list[str]:
    """Paths beside `path` with this suffix, the suffix removed, most similar first."""
    folder, name = os.path.split(path)
    names = [n.removesuffix(suffix) for n in listing(folder) if n.endswith(suffix)]
    ranked = sorted(names, key=lambda n: -difflib.SequenceMatcher(None, n, name.removesuffix(suffix)).ratio())
    return [os.path.join(folder, n) for n in ranked[:SHOWN_NAMES]]
