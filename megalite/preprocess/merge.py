"""Several indexed datasets into one, as shards of a preprocessing are."""

import glob
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from megalite.data.indexed import DatasetError, DatasetInfo, IndexedDataset, dataset_path
from megalite.preprocess.indexed_writer import IndexedWriter
from megalite.preprocess.journal import Journal

SHARD = re.compile(r"_(\d{4,})-of-(\d{4,})")
FLAG_OF = {
    "sentences": "--split-sentences",
    "append_eod": "--append-eod",
    "parse_special_tokens": "--parse-special-tokens",
}
TOLD = tuple(FLAG_OF)
"""What a description may leave open: those that tell must agree; the whole tells if all do."""


def find_prefixes(inputs: Sequence[str]) -> tuple[list[str], list[str]]:
    """(prefixes, problems): prefixes as they are, patterns and folders as the datasets in them, sorted by name."""
    prefixes, problems = [], [] if inputs else ["--input: give at least one dataset"]
    for name in inputs:
        if Path(name).is_dir():
            found = sorted(str(path)[: -len(".idx")] for path in Path(name).glob("*.idx"))
        elif glob.has_magic(name):
            found = sorted({re.sub(r"\.(idx|bin|json)$", "", path) for path in glob.glob(name)})
        else:
            found = [re.sub(r"\.(idx|bin|json)$", "", name)]
        if not found:
            problems.append(f"--input {name}: no dataset has such a name")
        prefixes += found
    places = [os.path.realpath(f"{prefix}.idx") for prefix in prefixes]
    twice = {prefix for prefix, place in zip(prefixes, places) if places.count(place) > 1}
    problems += [f"--input {prefix}: given twice" for prefix in sorted(twice)]
    return prefixes, [*problems, *_shard_problems(prefixes)]


def _sets_of_shards(prefixes: Sequence[str]) -> dict[str, list[tuple[str, int, int]]]:
    """(prefix, number, count) of the shards of each whole, by the whole's prefix, in the order given."""
    sets: dict[str, list[tuple[str, int, int]]] = {}
    for prefix in map(str, prefixes):
        if match := SHARD.search(Path(prefix).name):
            sets.setdefault(SHARD.sub("", prefix), []).append(
                (prefix, int(match[1]), int(match[2]))
            )
    return sets


def _shard_problems(prefixes: list[str]) -> Iterator[str]:
    """Shards of a set that are not there, stand in another order than in the whole, or beside the whole."""
    for whole, shards in _sets_of_shards(prefixes).items():
        numbers, counts = (
            [number for _, number, _ in shards],
            sorted({count for _, _, count in shards}),
        )
        missing = sorted(set(range(counts[-1])) - set(numbers))
        if whole in prefixes:
            yield f"--input: {whole} is given beside its shards; name the one or the others"
        elif len(counts) > 1:
            yield f"--input: shards of {whole} are of {' and of '.join(map(str, counts))}; merge one set"
        elif missing:
            yield f"--input: of {counts[0]} shards of {whole}, {', '.join(map(str, missing))} are missing"
        elif numbers != sorted(numbers):
            yield f"--input: shards of {whole} stand in the order {', '.join(map(str, numbers))}; give them by number"


def merge(prefixes: Sequence[str], output_prefix: str | Path) -> DatasetInfo | None:
    """Write the documents of all datasets, in their order, to one. Returns its description, if they have one.

    The output grows in OUTPUT_PREFIX.partial, which goes with an error; what a kill left there, the next merge clears.
    Raises DatasetError with everything that is wrong: a dataset that cannot be read, or was made in another way than
    the first, or an output that exists; FolderError when another process is at work.
    """
    folder = dataset_path(output_prefix, ".partial")
    if not folder.parent.is_dir():
        raise DatasetError(
            f"--output-prefix {output_prefix}: make the folder first: mkdir -p {folder.parent}"
        )
    with Journal(folder, {"merge": list(map(str, prefixes))}) as journal:
        if journal.state is None:
            renames = merge_into(folder, prefixes, output_prefix)
            journal.commit({"renames": [[str(source), str(final)] for source, final in renames]})
        journal.end(journal.state["renames"])
    return DatasetInfo.read(output_prefix)


def merge_into(
    folder: Path, prefixes: Sequence[str], output_prefix: str | Path
) -> list[tuple[Path, Path]]:
    """Write what `merge` does to files in a folder. Returns the renames that are left to do. Raises DatasetError."""
    datasets, infos, problems = [], {}, []
    for prefix in prefixes:
        try:
            datasets.append(IndexedDataset(prefix))
            infos[str(prefix)] = DatasetInfo.read(prefix)
        except (DatasetError, OSError) as error:
            problems.append(str(error))
    problems += [
        f"{dataset.prefix} holds {dataset.dtype.name}, {datasets[0].prefix} {datasets[0].dtype.name}"
        for dataset in datasets
        if dataset.dtype != datasets[0].dtype
    ]
    problems += [*_differences(infos), *_changed_inputs(infos)]
    if problems:
        raise DatasetError("\n".join(problems))
    with IndexedWriter(output_prefix, datasets[0].dtype, folder) as writer:
        for dataset in datasets:
            writer.append(dataset)
        return writer.seal(_whole([*infos.values()], writer.documents, writer.tokens))


def _differences(infos: dict[str, DatasetInfo | None]) -> Iterator[str]:
    """In what a dataset was made otherwise than the first."""
    whose, first = next(iter(infos.items()), (None, None))
    for prefix, info in infos.items():
        if (info is None) != (first is None):
            without, other = (prefix, whose) if info is None else (whose, prefix)
            yield (
                f"{without} has no .json that tells its tokenizer, as of Megatron-LM's files, and {other} has. To "
                "merge them unchecked, move every .json away"
            )
        elif first is not None:
            if any(getattr(info, name) != getattr(first, name) for name in DatasetInfo.TOKENIZER):
                yield f"{prefix} was made with another tokenizer than {whose}"
            for name in TOLD:
                told = getattr(first, name), getattr(info, name)
                if None not in told and told[0] != told[1]:
                    one, other = ("with" if value else "without" for value in told)
                    flag = FLAG_OF[name]
                    yield f"{prefix} was made {other} {flag}, {whose} {one}"


def _changed_inputs(infos: dict[str, DatasetInfo | None]) -> Iterator[str]:
    """Shards that were cut from other inputs than the first of their set: the whole would lack or repeat lines."""
    for shards in _sets_of_shards([*infos]).values():
        told = [
            (prefix, infos[prefix].inputs)
            for prefix, _, _ in shards
            if infos[prefix] and infos[prefix].inputs
        ]
        for prefix, inputs in told[1:]:
            if inputs != told[0][1]:
                yield (
                    f"{prefix} was made from other inputs than {told[0][0]}: a file was added, removed or changed "
                    "between them. Make the shards again, or those that are older than the change"
                )


def _whole(infos: list[DatasetInfo | None], documents: int, tokens: int) -> DatasetInfo | None:
    if infos[0] is None:
        return None
    agreed = {
        name: getattr(infos[0], name)
        for name in TOLD
        if all(getattr(i, name) is not None for i in infos)
    }
    return replace(
        infos[0], documents=documents, tokens=tokens, inputs=None, **dict.fromkeys(TOLD) | agreed
    )
