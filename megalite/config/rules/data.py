"""Rules that look at the data. Imports no torch."""

import os
from collections.abc import Iterator

from megalite.config.rules.disk import MAKE_DATA, neighbours
from megalite.config.rules.finding import PATHS, Finding, Rule, wanted_splits
from megalite.config.run import RunConfig


def prefixes_of(config: RunConfig) -> dict[str, list[str]]:
    """Prefixes that each field names; none for a field that cannot be read, which another rule tells."""
    from megalite.data.indexed import DatasetError
    from megalite.data.sources import parse_sources

    found = {}
    for key in PATHS:
        try:
            found[key] = [
                source.prefix for source in parse_sources(getattr(config.data, key) or ())
            ]
        except DatasetError:
            found[key] = []
    return {} if config.data.mock_data else found


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
            flag = "--" + key.replace("_", "-")
            missing = [
                prefix + suffix
                for suffix in (".bin", ".idx")
                if not os.path.isfile(prefix + suffix)
            ]
            if missing:
                beside = [
                    p
                    for p in neighbours(prefix.removesuffix(".bin"), ".idx")
                    if os.path.isfile(p + ".bin")
                ]
                words = [
                    tuple(p if w == prefix else w for w in getattr(config.data, key))
                    for p in beside
                ]
                offers = (*({key: value} for value in words), MAKE_DATA)
                yield Finding(
                    f"{flag} {prefix}: there is no {' and no '.join(missing)}", (key,), offers
                )
                continue
            try:
                IndexedDataset(prefix)
            except (DatasetError, OSError) as error:
                yield Finding(f"{flag} {prefix}: {error}", (key,), (MAKE_DATA,))


def data_fills_splits(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """For a GPT: documents and tokens for every split that the run asks for, in every source."""
    if config.is_bert:
        return  # a sample may be shorter
    needed = config.model.seq_length + 1
    for key, prefix, indexed in datasets_of(config):
        for split in wanted_splits(config):
            if (
                config.data.words_of(split)[1] is not getattr(config.data, key)
                or not indexed.contiguous
            ):
                continue  # not for this split; or only reading all of the index would tell, as building it does
            whole, share = key != "data_path", f"--split {config.data.split} gives {split}"
            tokens = (
                indexed.num_tokens
                if whole
                else _split_tokens(indexed, config.data.split).get(split, needed)
            )
            if tokens >= needed:
                continue
            others = [
                s
                for s in ("90,10,0", "80,20,0", "50,50,0")
                if _fills(indexed, s, needed, wanted_splits(config))
            ]
            shorter = [{"seq_length": n} for n in (2**k for k in range(20, 2, -1)) if n < tokens]
            quiet = [{"eval_interval": 0, "eval_iters": 0}] if split == "valid" else []
            yield Finding(
                f"{f'all {split} samples have' if whole else share} {tokens} tokens of {prefix} "
                f"({indexed.num_documents} documents), but a sample needs --seq-length + 1 = {needed}",
                (*(() if whole else ("split",)), key, "seq_length"),
                (
                    *({"split": other} for other in others[:1] if not whole),
                    *quiet,
                    *shorter,
                    "more data",
                ),
            )


def data_has_sentences(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """For a BERT: documents in every split, two for nsp; and for pairs, documents of more than one sentence."""
    if not config.is_bert:
        return
    pair, least = config.bert.bert_pair, 2 if config.bert.bert_pair == "nsp" else 1
    for key, prefix, indexed in datasets_of(config):
        whole = key != "data_path"
        for split in wanted_splits(config):
            if config.data.words_of(split)[1] is not getattr(config.data, key):
                continue
            count = (
                indexed.num_documents if whole else _documents_of(indexed, config.data.split)[split]
            )
            if count < least:
                shares = () if whole else ("90,10,0", "80,20,0", "50,50,0")
                fitting = (
                    s
                    for s in shares
                    if min(_documents_of(indexed, s)[x] for x in wanted_splits(config)) >= least
                )
                quiet = [{"eval_interval": 0, "eval_iters": 0}] if split == "valid" else []
                why = (
                    "next-sentence prediction takes sentences of two"
                    if pair == "nsp"
                    else "one is needed"
                )
                yield Finding(
                    f"documents of {prefix} for {split}: {count}, but {why}",
                    (key, "bert_pair", *(() if whole else ("split",))),
                    (*({"split": s} for s in list(fitting)[:1]), *quiet, "more data"),
                )
        if pair != "none" and _sentences(indexed, prefix) is False:
            yield Finding(
                f"{prefix} was made without --split-sentences: pairs of segments would be cut anywhere",
                (key, "bert_pair"),
                (f"{MAKE_DATA} --split-sentences", {"bert_pair": "none"}),
            )


def documents_are_ended(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """The flags that keep packed documents apart find the token that ends them, where PREFIX.json tells."""
    from megalite.data.indexed import DatasetError, DatasetInfo

    flags = [
        key
        for key in ("eod_mask_loss", "reset_position_ids", "reset_attention_mask")
        if getattr(config.data, key)
    ]
    if config.is_bert or not flags:
        return
    for key, prefixes in prefixes_of(config).items():
        for prefix in prefixes:
            try:
                info = DatasetInfo.read(prefix)
            except DatasetError:
                continue  # another rule tells
            if info is not None and info.append_eod is False:
                given = ", ".join("--" + flag.replace("_", "-") for flag in flags)
                yield Finding(
                    f"{prefix} was made without --append-eod: {given} would find no end of a document in it",
                    (key, *flags),
                    (f"{MAKE_DATA} --append-eod", dict.fromkeys(flags, False)),
                )


def splits_are_apart(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """No dataset is given for training in whole and for validation too."""
    d, prefixes = config.data, prefixes_of(config)
    if d.words_of("train")[1] is d.words_of("valid")[1] or "valid" not in wanted_splits(config):
        return
    keys = [
        d.words_of(split)[0].removeprefix("--").replace("-", "_") for split in ("train", "valid")
    ]
    train, valid = ({os.path.realpath(p): p for p in prefixes.get(key, ())} for key in keys)
    for place in sorted(train.keys() & valid.keys()):
        yield Finding(
            f"{train[place]} is read for training by --{keys[0].replace('_', '-')} and for validation by "
            f"--{keys[1].replace('_', '-')}: losses of text that was trained on say little",
            tuple(keys),
            (*({key: None} for key in keys if key != "data_path"), "other data for one of them"),
        )


def _sentences(indexed, prefix: str) -> bool | None:
    """Whether sequences are sentences, as PREFIX.json tells, or else as it seems: not where every document is one."""
    from megalite.data.indexed import DatasetError, DatasetInfo

    try:
        info = DatasetInfo.read(prefix)
    except DatasetError:
        return None
    if info is not None and info.sentences is not None:
        return info.sentences
    return not 0 < len(indexed) == indexed.num_documents


def _documents_of(indexed, shares: str) -> dict[str, int]:
    """Documents of each split; all for each where the shares cannot be read."""
    from megalite.data.gpt import SPLITS, split_documents
    from megalite.data.indexed import DatasetError

    try:
        return {
            name: last - first
            for name, (first, last) in split_documents(shares, indexed.num_documents).items()
        }
    except DatasetError:
        return dict.fromkeys(SPLITS, indexed.num_documents)


def _split_tokens(indexed, split: str) -> dict[str, int]:
    """Tokens of each split; {} for a split that cannot be read."""
    from megalite.data.gpt import split_documents
    from megalite.data.indexed import DatasetError

    try:
        documents = split_documents(split, indexed.num_documents)
    except DatasetError:
        return {}
    return {name: len(indexed.tokens(*bounds)) for name, bounds in documents.items()}


def _fills(indexed, split: str, needed: int, wanted: tuple[str, ...]) -> bool:
    tokens = _split_tokens(indexed, split)
    return all(tokens[name] >= needed for name in wanted)


DATA_RULES: tuple[Rule, ...] = (
    data_files_are_sound,
    data_fills_splits,
    data_has_sentences,
    documents_are_ended,
    splits_are_apart,
)
