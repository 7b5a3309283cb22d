"""Indexed datasets: token sequences in PREFIX.bin, where they lie in PREFIX.idx (the MMIDIDX format, version 1).

`IndexedDataset` reads, `IndexedWriter` writes; `megalite.data.indexed.format` describes the files.
"""

from megalite.data.indexed.format import CHUNK, DatasetError, DatasetInfo, dataset_path
from megalite.data.indexed.reader import GatheredStream, IndexedDataset, TokenStream
from megalite.data.indexed.writer import IndexedWriter

__all__ = [
    "CHUNK",
    "DatasetError",
    "DatasetInfo",
    "GatheredStream",
    "IndexedDataset",
    "IndexedWriter",
    "TokenStream",
    "dataset_path",
]
