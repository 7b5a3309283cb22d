"""Merge indexed datasets, such as the shards of an array job, into one.

    python tools/merge_datasets.py --input 'data/corpus_*-of-0008_text_document.idx' \\
        --output-prefix data/corpus_text_document

Datasets are merged in the order given; those of a pattern or folder in the order of their names, so
that shards follow each other. All must be made by the same tokenizer and options, and the shards
must be complete and in order.
"""

from dataclasses import dataclass

from megalite.config.cli import parse_options
from megalite.data.indexed import IndexedDataset
from megalite.preprocess.merge import find_prefixes, merge
from megalite.programs.reporting import failures_reported, refuse


@dataclass(frozen=True)
class MergeConfig:
    """Merge indexed datasets into one."""

    input: tuple[str, ...]
    """Prefixes of datasets (with or without .idx), folders of datasets, or patterns."""
    output_prefix: str
    """Prefix of the dataset to write: all of its name but .bin and .idx."""


def main() -> None:
    """Exit status 0, 1 when the data is at fault, 2 when the arguments are."""
    config = parse_options(MergeConfig, __doc__)
    prefixes, problems = find_prefixes(config.input)
    refuse(problems)
    with failures_reported():
        merge(prefixes, config.output_prefix)
    merged = IndexedDataset(config.output_prefix)
    sizes = f"{merged.num_documents:,} documents, {merged.num_tokens:,} tokens"
    print(f"{config.output_prefix}: {sizes} of {len(prefixes)}")
