"""Merge indexed datasets, such as the shards of an array job, into one.

    python tools/merge_datasets.py --input 'data/corpus_*-of-0008_text_document.idx' \\
        --output-prefix data/corpus_text_document

Datasets are taken in the order given; those of a pattern or folder by name, so that shards make the whole again. All
must be made in one way, and shards be whole: none missing or out of order, all cut from the same inputs.
"""

import sys
from dataclasses import dataclass

import tyro

from megalite.data.indexed import DatasetError, IndexedDataset
from megalite.preprocess.merge import find_prefixes, merge


@dataclass(frozen=True)
class MergeConfig:
    """Merge indexed datasets into one."""

    input: tuple[str, ...]
    """Prefixes of datasets (with or without .idx), folders of datasets, or patterns."""
    output_prefix: str
    """Prefix of the dataset to write: all of its name but .bin and .idx."""


def main() -> int:
    """Exit status 0, 1 when the data is at fault, 2 when the arguments are."""
    config = tyro.cli(MergeConfig, description=__doc__)
    prefixes, problems = find_prefixes(config.input)
    if not problems:
        try:
            merge(prefixes, config.output_prefix)
        except (DatasetError, OSError, KeyboardInterrupt) as error:
            said = str(error) or "interrupted"
            print("\n".join(f"error: {line}" for line in said.splitlines()), file=sys.stderr)
            return 1
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if problems:
        return 2
    merged = IndexedDataset(config.output_prefix)
    print(
        f"{config.output_prefix}: {merged.num_documents:,} documents, {merged.num_tokens:,} tokens of {len(prefixes)}"
    )
    return 0
