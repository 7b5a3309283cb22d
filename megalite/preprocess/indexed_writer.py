"""Writing indexed datasets (the format is in indexed.py): whole or not at all, and resumable in a folder."""

import io
import json
import os
import secrets
import struct
from contextlib import suppress
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megalite.data.indexed import (
    CHUNK,
    DTYPES,
    HEADER,
    MAGIC,
    VERSION,
    DatasetError,
    DatasetInfo,
    IndexedDataset,
    dataset_path,
)
from megalite.preprocess.journal import FolderError


class _NamedFile(io.FileIO):
    """A file whose name stands in the error when it cannot be written, as on a full disk."""

    def write(self, data) -> int:
        """Bytes written, maybe not all."""
        try:
            return super().write(data)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.name)) from None


class IndexedWriter:
    """Writes an indexed dataset as it comes, in bounded memory, under temporary names until `finish`.

    Use it in a `with` block: leaving the block without `finish` removes what was written, unless it lies in a `folder`
    of its own, from where another writer can go on. Only complete datasets ever have their final names; the .idx file
    is renamed last, so where it exists the dataset is whole.
    Raises DatasetError when the dataset exists already, at the start and again before the renames.
    """

    def __init__(
        self, prefix: str | Path, dtype, folder: Path | None = None, state: dict | None = None
    ):
        self.dtype = np.dtype(dtype).newbyteorder("<")
        codes = {np.dtype(name): code for code, name in DTYPES.items()}
        if self.dtype.kind not in "iu" or self.dtype not in codes:
            raise DatasetError(f"{prefix}: token ids cannot be stored as {np.dtype(dtype)}")
        self._code = codes[self.dtype]
        self._finals = {
            suffix: dataset_path(prefix, suffix) for suffix in (".bin", ".json", ".idx")
        }
        self.refuse_existing()
        self._folder = folder
        self._tag = f".{os.getpid()}-{secrets.token_hex(4)}.partial" if folder is None else ""
        self._files: dict[str, BinaryIO] = {}
        for suffix in (".bin", ".lengths", ".documents"):
            self._files[suffix] = self._open(suffix, "w+" if state is None else "r+")
        self.sequences = self.documents = self.tokens = 0
        if state is None:
            self._files[".documents"].write(struct.pack("<q", 0))
        else:
            self._go_on(state)

    def _open(self, suffix: str, mode: str) -> BinaryIO:
        try:
            return io.BufferedRandom(_NamedFile(self._partial(suffix), mode))
        except FileNotFoundError:
            if mode != "r+":
                raise
            raise FolderError(
                f"{self._partial(suffix)} is gone: delete {self._folder} to start anew"
            ) from None

    def _go_on(self, state: dict) -> None:
        """Cut the files back to a state that `state` told of them. Raises FolderError when they are shorter."""
        self.sequences, self.documents, self.tokens = (
            state["sequences"],
            state["documents"],
            state["tokens"],
        )
        sizes = (self.tokens * self.dtype.itemsize, 4 * self.sequences, 8 * (self.documents + 1))
        for (suffix, file), size in zip(self._files.items(), sizes, strict=True):
            if file.seek(0, os.SEEK_END) < size:
                raise FolderError(
                    f"{self._partial(suffix)}: shorter than the {size} bytes that were written to it: delete "
                    f"{self._folder} to start anew"
                )
            file.truncate(size)
            file.seek(size)

    def state(self) -> dict:
        """What is on the disk from now on: counts from which a writer in the same folder can go on."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        return {"sequences": self.sequences, "documents": self.documents, "tokens": self.tokens}

    def _partial(self, suffix: str) -> Path:
        final = self._finals[".bin"]
        if self._folder is not None:
            return self._folder / f"{final.name.removesuffix('.bin')}{suffix}"
        return final.with_name(f".{final.name.removesuffix('.bin')}{suffix}{self._tag}")

    def refuse_existing(self) -> None:
        """Raises DatasetError when the dataset exists."""
        existing = [str(path) for path in self._finals.values() if path.exists()]
        if existing:
            raise DatasetError(
                f"{', '.join(existing)} exists already. Delete it or choose another --output-prefix"
            )

    def add_document(self, *sequences: np.ndarray) -> None:
        """Append one document made of these sequences (usually one)."""
        arrays = [self._checked(np.asarray(sequence)) for sequence in sequences]
        lengths = np.array([len(array) for array in arrays], "<i4")
        data = b"".join(array.tobytes() for array in arrays)
        self._write(data, lengths, np.array([self.sequences + len(arrays)], "<i8"))

    def _checked(self, ids: np.ndarray) -> np.ndarray:
        stored = ids.astype(self.dtype, copy=False)
        if not np.array_equal(stored, ids):
            raise DatasetError(f"id {ids[stored != ids][0]} cannot be stored as {self.dtype.name}")
        return stored

    def add_documents(
        self, data: bytes | np.ndarray, lengths: np.ndarray, sequences: np.ndarray | None = None
    ) -> None:
        """Append documents: their ids in one go, in the writer's dtype, the length of each sequence, and how many
        sequences each document has (None: one)."""
        lengths = np.asarray(lengths, "<i4")
        counts = np.ones(len(lengths), "<i8") if sequences is None else np.asarray(sequences, "<i8")
        self._write(data, lengths, self.sequences + np.cumsum(counts))

    def append(self, dataset: IndexedDataset) -> None:
        """Append all documents of another dataset, in bounded memory."""
        if dataset.dtype != self.dtype:
            raise DatasetError(
                f"{dataset.prefix} holds {dataset.dtype.name}, the others {self.dtype.name}"
            )
        bounds = dataset.document_indices
        if not dataset.contiguous:
            for first, last in pairwise(map(int, bounds)):
                self.add_document(*map(dataset.sequence, range(first, last)))
            return
        for start in range(0, len(dataset.ids), CHUNK):
            self._files[".bin"].write(dataset.ids[start : start + CHUNK].tobytes())
        for start in range(0, len(dataset), CHUNK):
            self._files[".lengths"].write(dataset.lengths[start : start + CHUNK].tobytes())
        for start in range(1, len(bounds), CHUNK):
            self._files[".documents"].write(
                (bounds[start : start + CHUNK] + self.sequences).tobytes()
            )
        self.sequences += len(dataset)
        self.documents += dataset.num_documents
        self.tokens += dataset.num_tokens

    def _write(self, data: bytes | np.ndarray, lengths: np.ndarray, boundaries: np.ndarray) -> None:
        tokens, size = int(lengths.sum(dtype=np.int64)), memoryview(data).nbytes
        if size != tokens * self.dtype.itemsize:
            raise DatasetError(
                f"{size} bytes given for {tokens} tokens of {self.dtype.itemsize} bytes"
            )
        self._files[".bin"].write(data)
        self._files[".lengths"].write(lengths.tobytes())
        self._files[".documents"].write(boundaries.astype("<i8").tobytes())
        self.sequences += len(lengths)
        self.documents += len(boundaries)
        self.tokens += tokens

    def finish(self, info: DatasetInfo | None = None) -> None:
        """Write the index and, when given, the description; then give all files their final names."""
        for source, final in self.seal(info):
            source.rename(final)

    def seal(self, info: DatasetInfo | None = None) -> list[tuple[Path, Path]]:
        """Complete all files under their temporary names. Returns the renames that are left to do, in their order."""
        self._files[".idx"] = self._open(".idx", "w+")
        self._write_index(self._files[".idx"])
        if info is not None:
            self._files[".json"] = self._open(".json", "w+")
            self._files[".json"].write((json.dumps(asdict(info), indent=2) + "\n").encode())
        self.state()
        self.refuse_existing()
        renames = [
            (self._partial(suffix), final)
            for suffix, final in self._finals.items()
            if suffix in self._files
        ]
        for suffix in (".bin", ".json", ".idx"):
            if suffix in self._files:
                self._files.pop(suffix).close()
        if self._folder is None:
            self.abort()
        return renames

    def _write_index(self, index: BinaryIO) -> None:
        index.write(HEADER.pack(MAGIC, VERSION, self._code, self.sequences, self.documents + 1))
        for block in _blocks(self._files[".lengths"]):
            index.write(block)
        offset = 0
        for block in _blocks(self._files[".lengths"]):
            ends = (
                offset + np.cumsum(np.frombuffer(block, "<i4"), dtype="<i8") * self.dtype.itemsize
            )
            index.write(np.concatenate([[offset], ends[:-1]]).astype("<i8").tobytes())
            offset = int(ends[-1])
        for block in _blocks(self._files[".documents"]):
            index.write(block)

    def abort(self) -> None:
        """Remove every temporary file, or close those in a folder. Does nothing after `finish`."""
        while self._files:
            suffix, file = self._files.popitem()
            with suppress(OSError):  # on a full disk: what it still holds is not wanted any more
                file.close()
            if self._folder is None:
                self._partial(suffix).unlink(missing_ok=True)

    def __enter__(self) -> "IndexedWriter":
        return self

    def __exit__(self, *_) -> None:
        self.abort()


def _blocks(file: BinaryIO):
    """The content of a file in blocks of a whole number of index entries."""
    file.seek(0)
    while block := file.read(8 * CHUNK):
        yield block
