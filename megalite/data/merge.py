"""Several indexed datasets into one, as shards of a preprocessing are."""

import glob
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megalite.data.indexed import DatasetError, DatasetInfo, IndexedDataset, dataset_path
from megalite.data.indexed_writer import IndexedWriter

SHARD = re.compile(r"_(\d{4,})-of-(\d{4,})")


def find_prefixes(inputs: Sequence[str]) -> tuple[list[str], list[str]]:
    """(prefixes, problems): prefixes as they are, patterns and folders as the datasets in them, sorted by name."""
    prefixes, problems = [], [] if inputs else ["--input: give at least one dataset"]
    for name in inputs:
        if Path(name).is_dir():
            found = sorted(str(path)[: -len(".idx")] for path in Path(name).glob("*.idx"))
        elif glob.has_magic(name):
            found = sorted({re.sub(r"\.(idx|bin|json)$", "", path) for path in glob.glob(name)})
        else:
            found = [re.sub(r"\.(idx|bin)$", "", name)]
        if not found:
            problems.append(f"--input {name}: no dataset has such a name")
        prefixes += found
    problems += [f"--input {prefix}: given twice" for prefix in sorted({p for p in prefixes if prefixes.count(p) > 1})]
    return prefixes, problems + _missing_shards(prefixes)


def _missing_shards(prefixes: list[str]) -> list[str]:
    """Shards of a set that are not there, or stand in another order than the whole."""
    sets: dict[str, list[tuple[int, int]]] = {}
    for prefix in prefixes:
        if match := SHARD.search(Path(prefix).name):
            sets.setdefault(SHARD.sub("", prefix), []).append((int(match[1]), int(match[2])))
    problems = []
    for whole, shards in sets.items():
        counts = sorted({count for _, count in shards})
        missing = sorted(set(range(counts[-1])) - {number for number, _ in shards})
        if len(counts) > 1:
            problems.append(f"--input: shards of {whole} are of {' and of '.join(map(str, counts))}; merge one set")
        elif missing:
            problems.append(f"--input: of {counts[0]} shards of {whole}, {', '.join(map(str, missing))} are missing")
    return problems


def merge(prefixes: Sequence[str], output_prefix: str | Path) -> DatasetInfo | None:
    """Write the documents of all datasets, in their order, to one. Returns its description, if they have one.

    Raises DatasetError with everything that is wrong: a dataset that cannot be read, or is of another tokenizer or
    number type than the first, or an output that exists.
    """
    datasets, infos, problems = [], [], []
    for prefix in prefixes:
        try:
            datasets.append(IndexedDataset(prefix))
            infos.append(DatasetInfo.read(prefix))
        except (DatasetError, OSError) as error:
            problems.append(str(error))
    made = [replace(info, documents=0, tokens=0) if info else None for info in infos]
    for dataset, by in zip(datasets, made):
        if dataset.dtype != datasets[0].dtype:
            found, wanted = dataset.dtype.name, datasets[0].dtype.name
            problems.append(f"{dataset.prefix} holds {found}, {datasets[0].prefix} {wanted}")
        if by != made[0]:
            problems.append(f"{dataset.prefix} was made with another tokenizer than {datasets[0].prefix}")
    if problems:
        raise DatasetError("\n".join(problems))
    folder = dataset_path(output_prefix, ".idx").parent
    if not folder.is_dir():
        raise DatasetError(f"--output-prefix {output_prefix}: make the folder first: mkdir -p {folder}")
    with IndexedWriter(output_prefix, datasets[0].dtype) as writer:
        for dataset in datasets:
            writer.append(dataset)
        info = replace(infos[0], documents=writer.documents, tokens=writer.tokens) if infos[0] else None
        writer.finish(info)
    return info
