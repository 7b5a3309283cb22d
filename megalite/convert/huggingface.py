"""Weights of a Hugging Face folder under megalite's names, of which any box can be read."""

import itertools
import os
from collections.abc import KeysView
from contextlib import closing
from math import prod
from operator import sub
from pathlib import Path

import numpy as np
import torch

from megalite.checkpoint.folder import CheckpointError, open_regular
from megalite.checkpoint.format import SAFETENSORS_NAMES
from megalite.checkpoint.safetensors_header import ITEM_BYTES, StoredBytes, read_exactly
from megalite.checkpoint.source import TensorSource
from megalite.convert.published import PublishedFolder, StoredPiece, read_folder
from megalite.parallel.boxes import Box

COMPARED_BYTES = 1 << 24
"""Of two tensors that are compared, at a time."""
LEAST_BYTES = 4096
"""Shorter runs of bytes are read together with what lies between them: a disk reads pages."""


class HuggingFaceWeights(TensorSource):
    """The weights of a folder of Hugging Face, by megalite's names.

    Each rank may open one; nothing communicates. Opening reads config.json and the headers of the
    files; reading a box reads its bytes.
    """

    def __init__(self, found: PublishedFolder):
        self.published = found.published
        self.folder = found.published.folder
        self._found = found
        self._pieces = found.pieces
        self._shapes = found.published.shapes
        self._files: dict[Path, int] = {}
        self._room = np.empty(0, np.uint8)

    @classmethod
    def open(cls, folder: str | Path) -> "HuggingFaceWeights":
        """Open a folder with config.json and model.safetensors, or its shards and their index.

        Raises CheckpointError that lists everything that megalite cannot read as a model.
        """
        weights = cls(read_folder(folder))
        weights.check_tied()
        return weights

    def check_tied(self) -> None:
        """Read the output layer's weight, where there is one though config.json ties it to the
        embedding, and compare them. Raises CheckpointError when they differ: transformers would
        compute with both."""
        head = self._found.stored.get(self.published.architecture.untied.theirs)
        if head is None or not self.published.model.tied:
            return
        embedding = self._known("embedding.word_embeddings.weight")[0].stored
        with closing(self):  # a later read opens the files again
            if self._same_bytes(head, embedding):
                return
        raise CheckpointError(
            f"{self.folder}: {head.key} differs from {embedding.key}, but config.json says "
            '"tie_word_embeddings": true, or leaves it out: "tie_word_embeddings": false in '
            f"config.json keeps both; without {head.key} in the files the model is tied"
        )

    @property
    def names(self) -> KeysView[str]:
        """Names of all tensors: those of the model's parameters."""
        return self._pieces.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Global shape."""
        self._known(name)
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype."""
        return SAFETENSORS_NAMES[self._known(name)[0].stored.dtype]

    def read(self, name: str, box: Box | None = None) -> torch.Tensor:
        """One box of a tensor (None: all of it), on the CPU, in the stored dtype."""
        pieces = self._known(name)
        box = self._box(name, box)
        out = None
        for item in pieces:
            common = item.piece.box.intersect(box)
            if common is None:
                continue
            part = self._read_part(item, common, is_copied=common != box)
            if common == box:
                return part.contiguous()
            if out is None:
                out = torch.empty(box.shape, dtype=part.dtype)
            out[common.slices_in(box)] = part
        return torch.empty(box.shape, dtype=self.dtype(name)) if out is None else out

    def close(self) -> None:
        """Close the files; a later read opens them again."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def _same_bytes(self, one: StoredBytes, other: StoredBytes) -> bool:
        """Whether two tensors are stored alike."""
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            return False
        for begin in range(0, one.bytes, COMPARED_BYTES):
            length = min(COMPARED_BYTES, one.bytes - begin)
            parts = []
            for stored in (one, other):
                part = bytearray(length)
                self._read_bytes(stored, memoryview(part), stored.start + begin)
                parts.append(part)
            if parts[0] != parts[1]:
                return False
        return True

    def _known(self, name: str) -> list[StoredPiece]:
        if name not in self._pieces:
            raise self._unknown(name)
        return self._pieces[name]

    def _read_part(self, item: StoredPiece, common: Box, is_copied: bool) -> torch.Tensor:
        """The values of `common`, which lies in the piece's box, in our order. is_copied: see
        `_read_runs`."""
        piece = item.piece
        # The ranges of their axes.
        offset = tuple(map(sub, common.offset, piece.box.offset))
        ranges = [(0, 0)] * len(piece.factored)
        for ours, theirs in enumerate(piece.to_ours):
            ranges[theirs] = (offset[ours], offset[ours] + common.shape[ours])
        # The innermost axes are read as one run of bytes: all that are read whole, and one more.
        run = len(ranges)
        width = 1
        item_bytes = ITEM_BYTES[item.stored.dtype]
        while run:
            start, stop = ranges[run - 1]
            length = piece.factored[run - 1]
            run -= 1
            if (start, stop) == (0, length):
                width *= length
            elif run == 0 or (stop - start) * width * item_bytes >= LEAST_BYTES:
                width *= stop - start
                break
            else:
                width *= length
                ranges[run] = (0, length)
        values = self._read_runs(
            item.stored, piece.factored, ranges=ranges, run=run, is_copied=is_copied
        )
        # What was read in addition is cut off.
        wanted = []
        for ours in range(len(piece.to_ours)):
            first = offset[ours] - ranges[piece.to_ours[ours]][0]
            wanted.append(slice(first, first + common.shape[ours]))
        return values.permute(piece.to_ours)[tuple(wanted)]

    def _read_runs(
        self,
        stored: StoredBytes,
        factored: tuple[int, ...],
        *,
        ranges: list,
        run: int,
        is_copied: bool,
    ) -> torch.Tensor:
        """The elements in `ranges` of their axes. run: from this axis on, a run is contiguous.
        is_copied: the caller copies them before it reads others."""
        shape = [stop - start for start, stop in ranges]
        item_bytes = ITEM_BYTES[stored.dtype]
        length = prod(shape[run:]) * item_bytes
        strides = [prod(factored[axis + 1 :]) * item_bytes for axis in range(len(factored))]
        size = prod(shape) * item_bytes
        buffer = np.empty(size, np.uint8)
        if is_copied:
            # New memory costs as much as the reading: parts that are copied have one place.
            if len(self._room) < size:
                self._room = buffer
            buffer = self._room[:size]
        inner = stored.start
        if run < len(ranges):
            inner += ranges[run][0] * strides[run]
        target = memoryview(buffer)
        outer = itertools.starmap(range, ranges[:run])
        for number, place in enumerate(itertools.product(*outer)):
            begin = inner + sum(index * strides[axis] for axis, index in enumerate(place))
            self._read_bytes(stored, target[number * length : (number + 1) * length], begin)
        return torch.from_numpy(buffer).view(SAFETENSORS_NAMES[stored.dtype]).view(shape)

    def _read_bytes(self, stored: StoredBytes, target: memoryview, begin: int) -> None:
        """Fill `target` from the file, from byte `begin` on."""
        file = stored.file
        if file not in self._files:
            self._files[file] = open_regular(file)
        read_exactly(file, self._files[file], target, offset=begin, what=stored.key)
