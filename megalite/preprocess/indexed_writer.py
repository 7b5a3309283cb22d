"""Writing indexed datasets (see indexed.py for the format): complete or not at all, resumable."""

import json
import os
import secrets
import struct
from collections.abc import Iterator
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
from megalite.preprocess.journal import StagingError, open_named, sync_file


class IndexedWriter:
    """Appends documents to a new indexed dataset, in bounded memory.

    Until `finish`, files have temporary names: only a complete dataset has its final name, and the
    .idx file is renamed last, so where it exists the dataset is complete. Use it in a `with` block:
    leaving the block without `finish` removes the temporary files, unless they are in a staging
    directory, where another writer can resume.

    Args:
        prefix: path of the dataset, without .bin and .idx.
        dtype: integer dtype in which token ids are stored.
        staging_dir: folder for the temporary files; None: hidden files beside the final ones.
        state: what `sync` returned to the interrupted writer that this one resumes.

    Raises:
        DatasetError: the dataset exists, at the start or before the renames.
        StagingError: a file in the staging directory is missing or too short to resume from.
    """

    def __init__(
        self, prefix: str | Path, dtype, staging_dir: Path | None = None, state: dict | None = None
    ):
        self.dtype = np.dtype(dtype).newbyteorder("<")
        codes = {np.dtype(name): code for code, name in DTYPES.items()}
        if self.dtype.kind not in "iu" or self.dtype not in codes:
            raise DatasetError(f"{prefix}: token ids cannot be stored as {np.dtype(dtype)}")
        self._code = codes[self.dtype]
        self._finals = {}
        for suffix in (".bin", ".json", ".idx"):
            self._finals[suffix] = dataset_path(prefix, suffix)
        self._refuse_existing()
        self._staging_dir = staging_dir
        self._tag = f".{os.getpid()}-{secrets.token_hex(4)}.partial"
        self._files: dict[str, BinaryIO] = {}
        for suffix in (".bin", ".lengths", ".documents"):
            self._files[suffix] = self._open(suffix, "w+" if state is None else "r+")
        self.sequences = 0
        self.documents = 0
        self.tokens = 0
        if state is None:
            self._files[".documents"].write(struct.pack("<q", 0))
        else:
            self._resume_from(state)

    def _open(self, suffix: str, mode: str) -> BinaryIO:
        path = self._temporary(suffix)
        try:
            return open_named(path, mode)
        except FileNotFoundError:
            if mode != "r+":
                raise
            raise StagingError(
                f"{path} is gone: delete {self._staging_dir} to start again"
            ) from None

    def _resume_from(self, state: dict) -> None:
        """Truncate the files to a synced state. Raises StagingError when they are shorter."""
        self.sequences = state["sequences"]
        self.documents = state["documents"]
        self.tokens = state["tokens"]
        sizes = {
            ".bin": self.tokens * self.dtype.itemsize,
            ".lengths": 4 * self.sequences,
            ".documents": 8 * (self.documents + 1),
        }
        for suffix, size in sizes.items():
            file = self._files[suffix]
            if file.seek(0, os.SEEK_END) < size:
                raise StagingError(
                    f"{self._temporary(suffix)}: shorter than the {size} bytes that were written "
                    f"to it: delete {self._staging_dir} to start again"
                )
            file.truncate(size)
            file.seek(size)

    def sync(self) -> dict:
        """Flush everything to the disk. Returns the state from which another writer can resume."""
        for file in self._files.values():
            sync_file(file)
        return {"sequences": self.sequences, "documents": self.documents, "tokens": self.tokens}

    def _temporary(self, suffix: str) -> Path:
        """The temporary name of a file."""
        final = self._finals[".bin"]
        stem = final.name.removesuffix(".bin")
        if self._staging_dir is not None:
            return self._staging_dir / f"{stem}{suffix}"
        return final.with_name(f".{stem}{suffix}{self._tag}")

    def _refuse_existing(self) -> None:
        existing = [str(path) for path in self._finals.values() if path.exists()]
        if existing:
            raise DatasetError(
                f"{', '.join(existing)} exists already. Delete it or choose another --output-prefix"
            )

    def add_document(self, *sequences: np.ndarray) -> None:
        """Append one document made of these sequences (usually one)."""
        arrays = list(map(self._as_stored, sequences))
        lengths = np.array(list(map(len, arrays)), "<i4")
        data = b"".join(map(np.ndarray.tobytes, arrays))
        self._write(data, lengths, np.array([self.sequences + len(arrays)], "<i8"))

    def _as_stored(self, ids: np.ndarray) -> np.ndarray:
        """Ids in the dtype of the dataset. Raises DatasetError for one that does not fit."""
        ids = np.asarray(ids)
        stored = ids.astype(self.dtype, copy=False)
        if not np.array_equal(stored, ids):
            raise DatasetError(f"id {ids[stored != ids][0]} cannot be stored as {self.dtype.name}")
        return stored

    def add_documents(
        self, data: bytes | np.ndarray, lengths: np.ndarray, sequences: np.ndarray | None = None
    ) -> None:
        """Append several documents.

        Args:
            data: ids of all documents, one after another, in the dtype of the dataset.
            lengths: [sequences] tokens in each sequence.
            sequences: [documents] sequences in each document; None: one in each.
        """
        lengths = np.asarray(lengths, "<i4")
        if sequences is None:
            ends = np.arange(1, len(lengths) + 1)
        else:
            ends = np.cumsum(np.asarray(sequences, "<i8"))
        self._write(data, lengths, self.sequences + ends)

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
        # Copy ids, lengths and document boundaries in chunks; only the boundaries change.
        for start in range(0, len(dataset.ids), CHUNK):
            self._files[".bin"].write(dataset.ids[start : start + CHUNK].tobytes())
        for start in range(0, len(dataset), CHUNK):
            self._files[".lengths"].write(dataset.lengths[start : start + CHUNK].tobytes())
        for start in range(1, len(bounds), CHUNK):
            shifted = bounds[start : start + CHUNK] + self.sequences
            self._files[".documents"].write(shifted.tobytes())
        self.sequences += len(dataset)
        self.documents += dataset.num_documents
        self.tokens += dataset.num_tokens

    def _write(self, data: bytes | np.ndarray, lengths: np.ndarray, boundaries: np.ndarray) -> None:
        tokens = int(lengths.sum(dtype=np.int64))
        size = memoryview(data).nbytes
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
        """Write the index and, if given, the description; then rename all files to final names."""
        for source, final in self.seal(info):
            source.rename(final)

    def seal(self, info: DatasetInfo | None = None) -> list[tuple[Path, Path]]:
        """Complete all files under their temporary names.

        Returns the renames (temporary name, final name) that are left to do, in their order.
        """
        # Write the index, and the description.
        self._files[".idx"] = self._open(".idx", "w+")
        self._write_index(self._files[".idx"])
        if info is not None:
            self._files[".json"] = self._open(".json", "w+")
            self._files[".json"].write((json.dumps(asdict(info), indent=2) + "\n").encode())
        self.sync()
        self._refuse_existing()
        # Close what is to be renamed, so that `abort` keeps it.
        renames = []
        for suffix, final in self._finals.items():
            if suffix in self._files:
                self._files.pop(suffix).close()
                renames.append((self._temporary(suffix), final))
        if self._staging_dir is None:
            self.abort()
        return renames

    def _write_index(self, index: BinaryIO) -> None:
        """Write the .idx file: header, lengths, offsets, document boundaries."""
        index.write(HEADER.pack(MAGIC, VERSION, self._code, self.sequences, self.documents + 1))
        for block in _blocks(self._files[".lengths"]):
            index.write(block)
        # Offsets are the running sum of the lengths in bytes.
        offset = 0
        for block in _blocks(self._files[".lengths"]):
            lengths = np.frombuffer(block, "<i4")
            ends = offset + np.cumsum(lengths, dtype="<i8") * self.dtype.itemsize
            index.write(np.concatenate([[offset], ends[:-1]]).astype("<i8").tobytes())
            offset = int(ends[-1])
        for block in _blocks(self._files[".documents"]):
            index.write(block)

    def abort(self) -> None:
        """Remove every temporary file, or close those in a staging directory."""
        while self._files:
            suffix, file = self._files.popitem()
            with suppress(OSError):  # on a full disk; the buffered data is not needed any more
                file.close()
            if self._staging_dir is None:
                self._temporary(suffix).unlink(missing_ok=True)

    def __enter__(self) -> "IndexedWriter":
        return self

    def __exit__(self, *_) -> None:
        self.abort()


def _blocks(file: BinaryIO) -> Iterator[bytes]:
    """The content of a file in blocks of a whole number of index entries."""
    file.seek(0)
    while block := file.read(8 * CHUNK):
        yield block
