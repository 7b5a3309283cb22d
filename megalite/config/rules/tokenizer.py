"""Rules of the tokenizer: its flags, its files, and whether it made the data. Imports no torch."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from megalite.config.rules.data import datasets_of, prefixes_of
from megalite.config.rules.disk import MAKE_DATA, neighbours, without_remedy
from megalite.config.rules.finding import Finding, Rule, example_of, flag_of
from megalite.config.run import RunConfig, keys_where
from megalite.data.config import NO_SPECIAL_TEXTS, TOKENIZER_FILES

OTHER_TOKENIZER = "give the tokenizer that made the data, or make the data again with this one"


def tokenizer_is_whole(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """Every file that the kind of tokenizer is made of is named; NullTokenizer knows its size.
    Reads no file."""
    d = config.data
    for field in files_of(config):
        if getattr(d, field) is None:
            flag = flag_of(field)
            message = f"--tokenizer-type {d.tokenizer_type} needs {flag}"
            yield Finding(message, ("tokenizer_type", field), (f"{flag} FILE",))
    if d.tokenizer_type == "NullTokenizer" and config.model.vocab_size is None and not d.mock_data:
        yield Finding(
            "--tokenizer-type NullTokenizer needs --vocab-size, the ids and one more that ends "
            "documents",
            ("tokenizer_type", "vocab_size"),
            (example_of("vocab_size"),),
        )


def tokenizer_fits(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """The tokenizer can be built, fits the vocabulary, and has an end of a document if flags look
    for it."""
    from megalite.data.tokenizers import TokenizerError

    # Its files.
    files = files_of(config)
    paths = {field: getattr(config.data, field) for field in files}
    missing = [field for field, path in paths.items() if not os.path.exists(path or "")]
    for field in missing:
        path = paths[field]
        if path:
            message = f"{flag_of(field)} {path}: no such file. tools/train_tokenizer.py makes one"
            offers = (*_similar(config, field, path), f"{flag_of(field)} FILE")
            yield Finding(message, ("tokenizer_type", field), offers)
    if missing:
        return
    # The tokenizer that they make.
    try:
        tokenizer = build_tokenizer(config)
    except (TokenizerError, OSError) as error:
        offers = [f"{flag_of(field)} FILE" for field in files]
        flags = ("tokenizer_type", *files)
        if config.data.tokenizer_type == "TikTokenizer":
            flags = (*flags, "tiktoken_pattern")
            offers.append("--tiktoken-pattern NAME")
        yield Finding(str(error), flags, (*offers, "another --tokenizer-type"))
        return
    if tokenizer is not None:
        yield from _fits(config, tokenizer)


def _fits(config: RunConfig, tokenizer) -> Iterator[Finding]:
    """The tokenizer's entries fit the vocabulary, and one ends documents if flags look for it."""
    from megalite.data.tokenizers import TokenizerError

    vocab_size = config.model.vocab_size
    if vocab_size is not None and vocab_size < tokenizer.vocab_size:
        yield Finding(
            f"--vocab-size {vocab_size} is less than the {tokenizer.vocab_size} entries of the "
            "tokenizer",
            ("vocab_size", "tokenizer_type", *files_of(config)),
            ({"vocab_size": tokenizer.vocab_size}, {"vocab_size": None}),
        )
    for key in keys_where(lambda field: field.needs_eod):
        if not getattr(config.data, key):
            continue
        try:
            _ = tokenizer.eod
        except TokenizerError as error:
            message = f"{flag_of(key)} needs an end-of-document token: {error}"
            yield Finding(message, (key, *files_of(config)), ({key: False},))


def _similar(config: RunConfig, field: str, path: str) -> Iterator[dict[str, str]]:
    """Files beside a missing one that a tokenizer can be built from."""
    from megalite.data.tokenizers import TokenizerError

    suffix = Path(path).suffix or ".model"
    for beside in neighbours(path, suffix):
        changed = replace(config, data=replace(config.data, **{field: beside + suffix}))
        try:
            fits = build_tokenizer(changed) is not None
        except (TokenizerError, OSError):
            fits = False
        if fits:
            yield {field: beside + suffix}


def tokenizer_made_data(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """The tokenizer is the one that PREFIX.json says the data was made with; the data's ids fit the
    vocabulary."""
    from megalite.data.indexed import DatasetError, DatasetInfo
    from megalite.data.tokenizers import TokenizerError

    try:
        tokenizer = build_tokenizer(config)
    except (TokenizerError, OSError):
        return
    for key, prefixes in prefixes_of(config).items():
        for prefix in prefixes:
            try:
                info = DatasetInfo.read(prefix)
            except DatasetError as error:
                yield Finding(without_remedy(error), (key,), (MAKE_DATA,))
                continue
            if info:
                yield from _made_by(config, tokenizer, key, prefix=prefix, info=info)


def _made_by(config: RunConfig, tokenizer, key: str, prefix: str, info) -> Iterator[Finding]:
    """The description `info` of the dataset that field `key` names is that of this tokenizer, if
    there is one."""
    kind = config.data.tokenizer_type
    vocab_size = config.model.vocab_size
    if tokenizer and info.tokenizer_type != kind:
        yield Finding(
            f"--tokenizer-type {kind}, but {prefix} was made with {info.tokenizer_type}",
            ("tokenizer_type", key),
            (f"--tokenizer-type {info.tokenizer_type}, with its own files if it has any",),
        )
        return
    if not tokenizer:
        if vocab_size and vocab_size < info.vocab_size:
            yield Finding(
                f"--vocab-size {vocab_size} is less than the {info.vocab_size} entries that "
                f"{prefix} was made with",
                ("vocab_size", key),
                ({"vocab_size": info.vocab_size},),
            )
        return
    made_with = (info.tokenizer_sha256, info.vocab_size)
    if made_with != (tokenizer.sha256, tokenizer.vocab_size):
        files = files_of(config)
        named = " ".join(f"{flag_of(field)} {getattr(config.data, field)}" for field in files)
        yield Finding(
            f"{named or f'--tokenizer-type {kind}'} ({tokenizer.vocab_size} entries) is not the "
            f"one that {prefix} was made with ({info.vocab_size} entries, sha256 "
            f"{info.tokenizer_sha256[:12]})",
            (*files, key),
            (OTHER_TOKENIZER,),
        )
    elif info.parse_special_tokens and not config.data.parse_special_tokens:
        yield Finding(
            f"{prefix} was made with --parse-special-tokens, and this run, whose checkpoints say "
            "how prompts are encoded, is without it",
            ("parse_special_tokens", key),
            ({"parse_special_tokens": True},),
        )


def ids_fit_file(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """The numbers in the .bin file are wide enough for the tokenizer's ids."""
    import numpy as np

    from megalite.data.tokenizers import TokenizerError

    try:
        tokenizer = build_tokenizer(config)
    except (TokenizerError, OSError):
        return
    if tokenizer is None:
        return
    for key, prefix, indexed in datasets_of(config):
        largest = int(np.iinfo(indexed.dtype).max)
        if tokenizer.vocab_size > largest + 1:
            yield Finding(
                f"{prefix} holds ids up to {largest}, too few for the {tokenizer.vocab_size} "
                "entries of the tokenizer: it was made with another one",
                (key, "tokenizer_type", *files_of(config)),
                (OTHER_TOKENIZER,),
            )


TOKENIZER_FILE_RULES: tuple[Rule, ...] = (tokenizer_fits, tokenizer_made_data, ids_fit_file)


def build_tokenizer(config: RunConfig):
    """The configured tokenizer; None when none is, or not all it needs is given.

    Flags that do not belong to its kind are left out: nothing_is_ignored reports them. Raises
    TokenizerError, OSError.
    """
    from megalite.data.tokenizers import build_tokenizer

    kind = config.data.tokenizer_type
    size = config.model.vocab_size
    flags = {field: getattr(config.data, field) for field in files_of(config)}
    if kind is None or None in flags.values() or (kind == "NullTokenizer" and size is None):
        return None
    if kind == "TikTokenizer":
        flags["tiktoken_pattern"] = config.data.tiktoken_pattern
    if kind not in NO_SPECIAL_TEXTS:
        flags["parse_special_tokens"] = config.data.parse_special_tokens
    return build_tokenizer(kind, **flags, vocab_size=size)


def files_of(config: RunConfig) -> tuple[str, ...]:
    """The fields that name the files of the configured kind of tokenizer."""
    return TOKENIZER_FILES.get(config.data.tokenizer_type, ())
