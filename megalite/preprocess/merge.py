"""Merging indexed datasets, such as the shards of an array job, into one."""

import glob
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from operator import attrgetter
from pathlib import Path

from megalite.data.indexed import DatasetError, DatasetInfo, IndexedDataset, dataset_path
from megalite.preprocess.indexed_writer import IndexedWriter
from megalite.preprocess.journal import Journal
from megalite.system.errors import error_message

SHARD_NAME = re.compile(r"_(\d{4,})-of-(\d{4,})")
FLAG_OF = {
    "sentences": "--split-sentences",
    "append_eod": "--append-eod",
    "parse_special_tokens": "--parse-special-tokens",
}
"""Field of DatasetInfo -> the flag that sets it. Older descriptions lack these fields: those that
have one must agree, and the merged description has it if all do."""


def find_prefixes(inputs: Sequence[str]) -> tuple[list[str], list[str]]:
    """(prefixes, problems) of the arguments of --input.

    A prefix stands for itself, a pattern or folder for the datasets in it, sorted by name.
    """
    prefixes: list[str] = []
    problems: list[str] = []
    if not inputs:
        problems.append("--input: give at least one dataset")
    # Find the datasets of each argument.
    for name in inputs:
        if Path(name).is_dir():
            paths = glob.glob(os.path.join(glob.escape(name), "*.idx"))
        else:
            paths = glob.glob(name) if glob.has_magic(name) else [name]
        if not paths:
            problems.append(f"--input {name}: no dataset has such a name")
        prefixes += sorted({re.sub(r"\.(idx|bin|json)$", "", path) for path in paths})
    # Each dataset may be given once, under any name.
    files = [os.path.realpath(f"{prefix}.idx") for prefix in prefixes]
    for prefix, file in sorted(set(zip(prefixes, files))):
        if files.count(file) > 1:
            problems.append(f"--input {prefix}: given twice")
    problems += _shard_problems(prefixes)
    return prefixes, problems


def _shard_problems(prefixes: list[str]) -> Iterator[str]:
    """Sets of shards that are incomplete, out of order, mixed, or given beside their whole."""
    sets: dict[str, list[tuple[int, int]]] = {}
    for prefix in prefixes:
        if match := SHARD_NAME.search(Path(prefix).name):
            shard = (int(match[1]), int(match[2]))
            sets.setdefault(SHARD_NAME.sub("", prefix), []).append(shard)
    for whole, shards in sets.items():
        indices, counts = map(list, zip(*shards))
        counts = sorted(set(counts))
        missing = sorted(set(range(counts[-1])) - set(indices))
        if whole in prefixes:
            yield f"--input: {whole} is given beside its shards; name the one or the others"
        elif len(counts) > 1:
            found = " and of ".join(map(str, counts))
            yield f"--input: shards of {whole} are of {found}; merge one set"
        elif missing:
            found = ", ".join(map(str, missing))
            yield f"--input: of {counts[0]} shards of {whole}, {found} are missing"
        elif indices != sorted(indices):
            found = ", ".join(map(str, indices))
            yield f"--input: shards of {whole} are in the order {found}; give them by number"


def merge(prefixes: Sequence[str], output_prefix: str | Path) -> DatasetInfo | None:
    """Write the documents of all datasets, in their order, to one dataset.

    The output grows in OUTPUT_PREFIX.partial, which is removed after an error; what a killed
    merge left there, the next one removes.

    Returns:
        The description of the merged dataset, None if the datasets have none.

    Raises:
        DatasetError: with every problem: a dataset that cannot be read or was made in another way
            than the first, or an output that exists.
        StagingError: another process is writing the same output.
    """
    staging_dir = dataset_path(output_prefix, ".partial")
    if not staging_dir.parent.is_dir():
        raise DatasetError(
            f"--output-prefix {output_prefix}: make the folder first: mkdir -p {staging_dir.parent}"
        )
    with Journal(staging_dir, {"merge": list(map(str, prefixes))}) as journal:
        if journal.state is None:
            journal.commit({"renames": merge_into(staging_dir, prefixes, output_prefix)})
        journal.publish()
    return DatasetInfo.read(output_prefix)


def merge_into(
    staging_dir: Path, prefixes: Sequence[str], output_prefix: str | Path
) -> list[tuple[str, str]]:
    """Write the merged dataset to files in a staging directory.

    Returns the renames (temporary name, final name) that are left to do. Raises DatasetError.
    """
    # Open all datasets, and collect every problem before anything is written.
    datasets: list[IndexedDataset] = []
    infos: dict[str, DatasetInfo | None] = {}
    problems = []
    for prefix in prefixes:
        try:
            datasets.append(IndexedDataset(prefix))
            infos[str(prefix)] = DatasetInfo.read(prefix)
        except (DatasetError, OSError) as error:
            problems.append(error_message(error))
    for dataset in datasets:
        first = datasets[0]
        if dataset.dtype != first.dtype:
            problems.append(
                f"{dataset.prefix} holds {dataset.dtype.name}, {first.prefix} {first.dtype.name}"
            )
    problems += _differences(infos)
    if problems:
        raise DatasetError("\n".join(problems))
    # Copy them one after another.
    with IndexedWriter(output_prefix, datasets[0].dtype, staging_dir) as writer:
        for dataset in datasets:
            writer.append(dataset)
        return writer.seal(_merged_info(list(infos.values()), writer))


def _differences(infos: dict[str, DatasetInfo | None]) -> Iterator[str]:
    """How the datasets were made differently from the first one."""
    first_prefix, first = next(iter(infos.items()), (None, None))
    first_of: dict[str, tuple[str, str]] = {}
    for prefix, info in infos.items():
        # Either all datasets have a description, or none has.
        if (info is None) != (first is None):
            without, other = (prefix, first_prefix) if info is None else (first_prefix, prefix)
            yield (
                f"{without} has no .json that tells its tokenizer, as of Megatron-LM's files, and "
                f"{other} has. To merge them unchecked, move every .json away"
            )
            continue
        if first is None:
            continue
        if any(getattr(info, name) != getattr(first, name) for name in DatasetInfo.TOKENIZER):
            yield f"{prefix} was made with another tokenizer than {first_prefix}"
        for name, flag in FLAG_OF.items():
            expected = getattr(first, name)
            found = getattr(info, name)
            if None not in (expected, found) and expected != found:
                how = "with" if found else "without"
                other = "with" if expected else "without"
                yield f"{prefix} was made {how} {flag}, {first_prefix} {other}"
        # Of shards cut from different inputs, the whole would lack or repeat lines.
        if info.inputs:
            whole = SHARD_NAME.sub("", prefix)
            other, inputs = first_of.setdefault(whole, (prefix, info.inputs))
            if info.inputs != inputs:
                yield (
                    f"{prefix} was made from other inputs than {other}: a file was added, removed "
                    "or changed between them. Make all shards again, or those that are older than "
                    "the change"
                )


def _merged_info(infos: list[DatasetInfo | None], writer: IndexedWriter) -> DatasetInfo | None:
    """The description of datasets that agree, with the sizes of the merged one."""
    if infos[0] is None:
        return None
    changes = {"documents": writer.documents, "tokens": writer.tokens, "inputs": None}
    for name in FLAG_OF:
        if None in map(attrgetter(name), infos):
            changes[name] = None
    return replace(infos[0], **changes)
