"""Rules that look at the data, and what the rules of each architecture need. Imports no torch."""

import os
from collections.abc import Callable, Iterator
from typing import Any

from megalite.config.rules.disk import MAKE_DATA, neighbours, without_fix
from megalite.config.rules.finding import Finding, Rule, flag_of, wanted_splits, without_evaluation
from megalite.config.run import RunConfig
from megalite.data.gpt import SPLITS, split_documents
from megalite.data.indexed import DatasetError, DatasetInfo, IndexedDataset
from megalite.data.sources import parse_sources
from megalite.system.errors import broken_link

SUGGESTED_SPLITS = ("90,10,0", "80,20,0", "50,50,0")
"""Values of --split that are offered where a split is too small."""


def prefixes_of(config: RunConfig) -> Iterator[tuple[str, str]]:
    """(field, prefix) of every dataset; none of a field that cannot be read, which another rule
    reports."""
    for key, words in config.data.paths.items():
        try:
            sources = parse_sources(words or ())
        except DatasetError:
            continue
        if not config.data.mock_data:
            yield from ((key, source.prefix) for source in sources)


def datasets_of(config: RunConfig) -> Iterator[tuple[str, str, IndexedDataset]]:
    """(field, prefix, dataset) of every dataset that can be opened."""
    for key, prefix in prefixes_of(config):
        try:
            yield key, prefix, IndexedDataset(prefix)
        except (DatasetError, OSError):
            continue


def info_of(prefix: str) -> DatasetInfo | None:
    """What PREFIX.json says; None where there is no such file or, as another rule reports, it
    cannot be read."""
    try:
        return DatasetInfo.read(prefix)
    except (DatasetError, OSError):
        return None


def data_files_are_sound(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """PREFIX.bin and PREFIX.idx exist, and fit each other as far as a quick look tells; PREFIX.json
    can be read."""
    for key, prefix in prefixes_of(config):
        paths = [prefix + suffix for suffix in (".bin", ".idx")]
        missing = [path for path in paths if not os.path.isfile(path)]
        if missing:
            message = f"{flag_of(key)} {prefix}: there is no {' and no '.join(missing)}"
            links = filter(None, map(broken_link, missing))
            message = "; ".join([message, *links])
            yield Finding(message, *_similar(config, key, prefix), MAKE_DATA)
            continue
        for read in (IndexedDataset, DatasetInfo.read):
            try:
                read(prefix)
            except (DatasetError, OSError) as error:
                yield Finding(f"{flag_of(key)} {prefix}: {without_fix(error)}", MAKE_DATA)


def _similar(config: RunConfig, key: str, prefix: str) -> Iterator[dict[str, tuple[str, ...]]]:
    """The field's value with datasets that there are in place of a missing one."""
    for other in neighbours(prefix.removesuffix(".bin"), ".idx"):
        if os.path.isfile(other + ".bin"):
            words = getattr(config.data, key)
            yield {key: tuple(other if word == prefix else word for word in words)}


def splits_are_apart(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """No dataset is given for training in whole and for validation too."""
    train_flag, train_words = config.data.words_of("train")
    valid_flag, valid_words = config.data.words_of("valid")
    if train_words is valid_words or "valid" not in wanted_splits(config):
        return
    prefixes = {train_flag: {}, valid_flag: {}}
    for key, prefix in prefixes_of(config):
        prefixes.get(flag_of(key), {})[os.path.realpath(prefix)] = prefix
    train = prefixes[train_flag]
    removable = [key for key in ("train_data_path", "valid_data_path") if flag_of(key) in prefixes]
    for path in sorted(train.keys() & prefixes[valid_flag].keys()):
        yield Finding(
            f"{train[path]} is read for training by {train_flag} and for validation by "
            f"{valid_flag}: losses of text that was trained on say little",
            *({key: None} for key in removable),
            "other data for one of them",
        )


def short_splits(
    config: RunConfig,
    key: str,
    indexed: IndexedDataset,
    measure: Callable[[IndexedDataset, int, int], int],
    least: int,
) -> Iterator[tuple[str, int, list[dict[str, Any]]]]:
    """(split, its size, possible fixes) for each split that the run reads from the dataset of field
    `key` and that is smaller than `least`.

    `measure(indexed, first, end)` is the size of some documents.
    """

    def sizes(shares: str | None) -> dict[str, int]:
        bounds = dict.fromkeys(SPLITS, (0, indexed.num_documents))
        try:
            if shares is not None:
                bounds = split_documents(shares, indexed.num_documents)
        except DatasetError:
            pass  # split_is_readable reports it
        return {split: measure(indexed, *ends) for split, ends in bounds.items()}

    divided = key == "data_path"
    wanted = wanted_splits(config)
    found = sizes(config.data.split if divided else None)
    for split in wanted:
        given = config.data.words_of(split)[1]
        if given is not getattr(config.data, key) or found[split] >= least:
            continue
        fixes = []
        for shares in SUGGESTED_SPLITS:
            if divided and not fixes and min(map(sizes(shares).get, wanted)) >= least:
                fixes = [{"split": shares}]
        if split == "valid":
            fixes.append(without_evaluation())
        yield split, found[split], fixes


DATA_RULES: tuple[Rule, ...] = (data_files_are_sound, splits_are_apart)
