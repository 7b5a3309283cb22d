"""Rules that look at the data, and what the rules of each architecture need. Imports no torch."""

import os
from collections.abc import Callable, Iterator

from megalite.config.rules.disk import MAKE_DATA, neighbours, without_remedy
from megalite.config.rules.finding import Finding, Rule, flag_of, wanted_splits
from megalite.config.run import RunConfig

SPLIT_OFFERS = ("90,10,0", "80,20,0", "50,50,0")
"""Values of --split that are offered where a split is too small."""


def prefixes_of(config: RunConfig) -> dict[str, list[str]]:
    """Prefixes of datasets by the field that names them; none for a field that cannot be read,
    which another rule reports."""
    from megalite.data.indexed import DatasetError
    from megalite.data.sources import parse_sources

    if config.data.mock_data:
        return {}
    found = {}
    for key, words in config.data.paths.items():
        try:
            found[key] = [source.prefix for source in parse_sources(words or ())]
        except DatasetError:
            found[key] = []
    return found


def datasets_of(config: RunConfig) -> Iterator[tuple[str, str, object]]:
    """(field, prefix, IndexedDataset) of every dataset that can be opened."""
    from megalite.data.indexed import DatasetError, IndexedDataset

    for key, prefixes in prefixes_of(config).items():
        for prefix in prefixes:
            try:
                yield key, prefix, IndexedDataset(prefix)
            except (DatasetError, OSError):
                continue


def data_files_are_sound(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """PREFIX.bin and PREFIX.idx exist, and fit each other as far as a quick look tells."""
    from megalite.data.indexed import DatasetError, IndexedDataset

    for key, prefixes in prefixes_of(config).items():
        for prefix in prefixes:
            paths = [prefix + suffix for suffix in (".bin", ".idx")]
            missing = [path for path in paths if not os.path.isfile(path)]
            if missing:
                message = f"{flag_of(key)} {prefix}: there is no {' and no '.join(missing)}"
                yield Finding(message, (key,), (*_similar(config, key, prefix), MAKE_DATA))
                continue
            try:
                IndexedDataset(prefix)
            except (DatasetError, OSError) as error:
                message = f"{flag_of(key)} {prefix}: {without_remedy(error)}"
                yield Finding(message, (key,), (MAKE_DATA,))


def _similar(config: RunConfig, key: str, prefix: str) -> Iterator[dict[str, tuple[str, ...]]]:
    """The field's value with datasets that there are in place of a missing one."""
    for other in neighbours(prefix.removesuffix(".bin"), ".idx"):
        if os.path.isfile(other + ".bin"):
            words = getattr(config.data, key)
            yield {key: tuple(other if word == prefix else word for word in words)}


def splits_are_apart(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """No dataset is given for training in whole and for validation too."""
    d = config.data
    train_flag, train_words = d.words_of("train")
    valid_flag, valid_words = d.words_of("valid")
    if train_words is valid_words or "valid" not in wanted_splits(config):
        return
    keys = [flag.removeprefix("--").replace("-", "_") for flag in (train_flag, valid_flag)]
    prefixes = prefixes_of(config)
    train, valid = ({os.path.realpath(p): p for p in prefixes.get(key, ())} for key in keys)
    for path in sorted(train.keys() & valid.keys()):
        removable = [{key: None} for key in keys if key != "data_path"]
        yield Finding(
            f"{train[path]} is read for training by {train_flag} and for validation by "
            f"{valid_flag}: losses of text that was trained on say little",
            tuple(keys),
            (*removable, "other data for one of them"),
        )


def documents_of(indexed, shares: str) -> dict[str, int]:
    """Documents of each split; all for each where the shares cannot be read."""
    from megalite.data.gpt import SPLITS, split_documents
    from megalite.data.indexed import DatasetError

    try:
        bounds = split_documents(shares, indexed.num_documents)
    except DatasetError:
        return dict.fromkeys(SPLITS, indexed.num_documents)
    return {name: last - first for name, (first, last) in bounds.items()}


def tokens_of(indexed, shares: str) -> dict[str, int]:
    """Tokens of each split; {} where the shares cannot be read."""
    from megalite.data.gpt import split_documents
    from megalite.data.indexed import DatasetError

    try:
        bounds = split_documents(shares, indexed.num_documents)
    except DatasetError:
        return {}
    return {name: len(indexed.tokens(*ends)) for name, ends in bounds.items()}


def other_splits(
    config: RunConfig, indexed, count: Callable[..., dict[str, int]], least: int
) -> list[dict[str, str]]:
    """A value of --split by which `count` gives every split that is read at least `least`, if one
    of the usual ones does."""
    for shares in SPLIT_OFFERS:
        counts = count(indexed, shares)
        if all(counts[split] >= least for split in wanted_splits(config)):
            return [{"split": shares}]
    return []


DATA_RULES: tuple[Rule, ...] = (data_files_are_sound, splits_are_apart)
