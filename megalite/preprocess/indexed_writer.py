"""Writing indexed datasets (see indexed.py for the format): complete or not at all, resumable."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megalite.data import indexed
from megalite.data.indexed import CHUNK, DatasetError, DatasetInfo, IndexedDataset, dataset_path
from megalite.preprocess.journal import StagingError, open_named, sync_file


class IndexedWriter:
    """Appends documents to a new indexed dataset, in bounded memory.

    The files grow in a staging directory until `finish`, which renames the .idx file last: where it
    exists the dataset is complete. Use it in a `with` block: leaving the block closes the files,
    and removes a staging directory of the writer's own.

    Args:
        prefix: path of the dataset, without .bin and .idx.
        dtype: integer dtype in which token ids are stored.
        staging_dir: folder for the files, in which another writer can resume; None: a hidden one
            of its own beside the dataset.
        state: what `sync` returned to the interrupted writer that this one resumes.

    Raises:
        DatasetError: the dataset exists, at the start or before the renames.
        StagingError: a file in the staging directory is missing or too short to resume from.
    """

    def __init__(
        self, prefix: str | Path, dtype, staging_dir: Path | None = None, state: dict | None = None
    ):
        self.dtype = np.dtype(dtype).newbyteorder("<")
        codes = {np.dtype(name): code for code, name in indexed.DTYPES.items()}
        if self.dtype.kind not in "iu" or self.dtype not in codes:
            raise DatasetError(f"{prefix}: token ids cannot be stored as {np.dtype(dtype)}")
        self._code = codes[self.dtype]
        self._finals = {
            suffix: dataset_path(prefix, suffix) for suffix in (".bin", ".json", ".idx")
        }
        refuse_existing(self._finals.values())
        self._stem = Path(prefix).name
        self._own_dir = staging_dir is None
        if self._own_dir:
            place = dataset_path(prefix, "").parent
            staging_dir = Path(tempfile.mkdtemp(".partial", f".{self._stem}.", place))
        self._staging_dir = staging_dir
        self._files: dict[str, BinaryIO] = {}
        for suffix in (".bin", ".lengths", ".documents"):
            self._open(suffix, "w+" if state is None else "r+")
        if state is None:
            self._files[".documents"].write(bytes(8))  # the boundary before the first document
            state = {"sequences": 0, "documents": 0, "tokens": 0}
        # Truncate the files to the state.
        self.sequences = state["sequences"]
        self.documents = state["documents"]
        self.tokens = state["tokens"]
        truncate(self._files[".bin"], self.tokens * self.dtype.itemsize)
        truncate(self._files[".lengths"], 4 * self.sequences)
        truncate(self._files[".documents"], 8 * (self.documents + 1))

    def _open(self, suffix: str, mode: str) -> BinaryIO:
        path = self._staging_dir / f"{self._stem}{suffix}"
        if mode == "r+" and not path.exists():
            raise StagingError(f"{path} is gone: delete {self._staging_dir} to start again")
        self._files[suffix] = open_named(path, mode)
        return self._files[suffix]

    def sync(self) -> dict:
        """Flush everything to the disk. Returns the state from which another writer can resume."""
        for file in self._files.values():
            sync_file(file)
        return {"sequences": self.sequences, "documents": self.documents, "tokens": self.tokens}

    def add_document(self, *sequences: np.ndarray) -> None:
        """Append one document made of these sequences (usually one)."""
        arrays = list(map(self._as_stored, sequences))
        data = b"".join(map(np.ndarray.tobytes, arrays))
        self.add_documents(data, list(map(len, arrays)), [len(arrays)])

    def _as_stored(self, ids: np.ndarray) -> np.ndarray:
        """Ids in the dtype of the dataset. Raises DatasetError for one that does not fit."""
        ids = np.asarray(ids)
        stored = ids.astype(self.dtype, copy=False)
        if not np.array_equal(stored, ids):
            raise DatasetError(f"id {ids[stored != ids][0]} cannot be stored as {self.dtype.name}")
        return stored

    def add_documents(self, data: bytes | np.ndarray, lengths, sequences=None) -> None:
        """Append several documents.

        Args:
            data: ids of all documents, one after another, in the dtype of the dataset.
            lengths: integers [sequences], tokens in each sequence.
            sequences: integers [documents], sequences in each document; None: one in each.
        """
        lengths = np.asarray(lengths, "<i4")
        if sequences is None:
            sequences = np.ones(len(lengths), "<i8")
        tokens = int(lengths.sum(dtype=np.int64))
        size = memoryview(data).nbytes
        if size != tokens * self.dtype.itemsize:
            raise DatasetError(
                f"{size} bytes given for {tokens} tokens of {self.dtype.itemsize} bytes"
            )
        boundaries = self.sequences + np.cumsum(sequences, dtype="<i8")
        self._files[".bin"].write(data)
        self._files[".lengths"].write(lengths.tobytes())
        self._files[".documents"].write(boundaries.tobytes())
        self.sequences += len(lengths)
        self.documents += len(boundaries)
        self.tokens += tokens

    def append(self, dataset: IndexedDataset) -> None:
        """Append all documents of another dataset of this dtype, in bounded memory."""
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

    def finish(self, info: DatasetInfo | None = None) -> None:
        """Write the index and, if given, the description; then rename all files to final names."""
        for source, final in self.seal(info):
            os.rename(source, final)
        self.abort()

    def seal(self, info: DatasetInfo | None = None) -> list[tuple[str, str]]:
        """Complete all files in the staging directory.

        Returns the renames (name there, final name) that are left to do, in their order.
        """
        self._write_index(self._open(".idx", "w+"))
        if info is not None:
            self._open(".json", "w+").write((json.dumps(asdict(info), indent=2) + "\n").encode())
        self.sync()
        refuse_existing(self._finals.values())
        renames = []
        for suffix, final in self._finals.items():
            if suffix in self._files:
                renames.append((str(self._files[suffix].raw.name), str(final)))
        return renames

    def _write_index(self, index: BinaryIO) -> None:
        """Write the .idx file: header, lengths, offsets, document boundaries."""
        counts = (self.sequences, self.documents + 1)
        index.write(indexed.HEADER.pack(indexed.MAGIC, indexed.VERSION, self._code, *counts))
        index.writelines(_blocks(self._files[".lengths"]))
        # Offsets are the running sum of the lengths in bytes.
        offset = 0
        for block in _blocks(self._files[".lengths"]):
            lengths = np.frombuffer(block, "<i4")
            ends = offset + np.cumsum(lengths, dtype="<i8") * self.dtype.itemsize
            index.write(np.concatenate([[offset], ends[:-1]]).astype("<i8").tobytes())
            offset = int(ends[-1])
        index.writelines(_blocks(self._files[".documents"]))

    def abort(self) -> None:
        """Close all files, and remove those in a staging directory of the writer's own."""
        for file in self._files.values():
            with suppress(OSError):  # on a full disk; the buffered data is not needed any more
                file.close()
        if self._own_dir:
            shutil.rmtree(self._staging_dir, ignore_errors=True)

    def __enter__(self) -> "IndexedWriter":
        return self

    def __exit__(self, *_) -> None:
        self.abort()


def refuse_existing(paths: Iterable[str | Path]) -> None:
    """Raise DatasetError when one of the files to write exists already."""
    if existing := [str(path) for path in paths if os.path.exists(path)]:
        raise DatasetError(
            f"{', '.join(existing)} exists already. Delete it or choose another --output-prefix"
        )


def truncate(file: BinaryIO, size: int) -> None:
    """Cut a file in a staging directory to the size that was synced, to append to it.

    Raises StagingError when it is shorter.
    """
    if file.seek(0, os.SEEK_END) < size:
        path = Path(file.raw.name)
        raise StagingError(
            f"{path}: shorter than the {size} bytes that were written to it: delete {path.parent} "
            "to start again"
        )
    file.truncate(size)
    file.seek(size)


def _blocks(file: BinaryIO) -> Iterator[bytes]:
    """The content of a file in blocks of a whole number of index entries."""
    file.seek(0)
    while block := file.read(8 * CHUNK):
        yield block
