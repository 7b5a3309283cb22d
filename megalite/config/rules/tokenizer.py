"""Rules of the tokenizer: its flags, its files, and whether it made the data. Imports no torch."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megalite.config.rules.data import datasets_of, info_of, prefixes_of
from megalite.config.rules.disk import neighbours
from megalite.config.rules.finding import Finding, Rule, example_of, flag_of
from megalite.config.run import RunConfig, keys_where, with_values
from megalite.data import tokenizers
from megalite.data.config import NO_SPECIAL_TEXTS, TOKENIZER_FILES
from megalite.data.tokenizers import Tokenizer, TokenizerError
from megalite.models.presets import preset
from megalite.system.errors import broken_link, error_message

OTHER_TOKENIZER = "give the tokenizer that made the data, or make the data again with this one"


def tokenizer_is_whole(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """Every file that the kind of tokenizer is made of is named; NullTokenizer knows its size.
    Reads no file."""
    d = config.data
    for field in files_of(config):
        if getattr(d, field) is None:
            flag = flag_of(field)
            yield Finding(f"--tokenizer-type {d.tokenizer_type} needs {flag}", f"{flag} FILE")
    if d.tokenizer_type == "NullTokenizer" and config.model.vocab_size is None and not d.mock_data:
        yield Finding(
            "--tokenizer-type NullTokenizer needs --vocab-size, the ids and one more that ends "
            "documents",
            example_of("vocab_size"),
        )


def tokenizer_fits(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """The tokenizer can be built, fits the vocabulary, and has an end of a document if flags look
    for it."""
    # Its files.
    files = files_of(config)
    missing = [key for key in files if not os.path.exists(getattr(config.data, key) or "")]
    for field in missing:
        path = getattr(config.data, field)
        if path:
            yield Finding(
                f"{flag_of(field)} {path}: {broken_link(path) or 'no such file'}. "
                "tools/train_tokenizer.py makes one",
                *_similar(config, field, path),
                f"{flag_of(field)} FILE",
            )
    if missing:
        return
    # The tokenizer that they make.
    try:
        tokenizer = build_tokenizer(config)
    except (TokenizerError, OSError) as error:
        fixes = [f"{flag_of(field)} FILE" for field in files]
        if config.data.tokenizer_type == "TikTokenizer":
            fixes.append("--tiktoken-pattern NAME")
        fixes.append("another --tokenizer-type")
        yield Finding(error_message(error), *fixes, also=("tiktoken_pattern",))
        return
    if tokenizer is None:
        return
    # Its entries, and one that ends documents if flags look for it.
    vocab_size = config.model.vocab_size
    if vocab_size is not None and vocab_size < tokenizer.vocab_size:
        given = f"--vocab-size {vocab_size}"
        if preset(config.model.preset).get("vocab_size") == vocab_size:
            given = f"the vocabulary of --preset {config.model.preset}, {vocab_size},"
        fixes = [{"vocab_size": tokenizer.vocab_size}, {"vocab_size": None}]
        if config.checkpoint.load_hf:
            given = f"the vocabulary of --load-hf {config.checkpoint.load_hf}, {vocab_size},"
            fixes = ["the tokenizer that the model was trained with"]
        message = f"{given} is less than the {tokenizer.vocab_size} entries of the tokenizer"
        yield Finding(message, *fixes, also=("vocab_size",))
    for key in keys_where(lambda field: field.needs_eod):
        try:
            _ = getattr(config.data, key) and tokenizer.eod
        except TokenizerError as error:
            message = f"{flag_of(key)} needs an end-of-document token: {error}"
            yield Finding(message, {key: False})


def _similar(config: RunConfig, field: str, path: str) -> Iterator[dict[str, str]]:
    """Files beside a missing one that a tokenizer can be built from."""
    suffix = Path(path).suffix or ".model"
    for beside in neighbours(path, suffix):
        change = {field: beside + suffix}
        if tokenizer_or_none(with_values(config, change)) is not None:
            yield change


def tokenizer_made_data(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """The tokenizer is the one that PREFIX.json says the data was made with; the data's ids fit the
    vocabulary."""
    tokenizer = tokenizer_or_none(config)
    kind = config.data.tokenizer_type
    vocab_size = config.model.vocab_size
    files = files_of(config)
    named = " ".join(f"{flag_of(field)} {getattr(config.data, field)}" for field in files)
    for _, prefix in prefixes_of(config):
        info = info_of(prefix)
        if info is None:
            continue
        if tokenizer is None:
            if vocab_size and vocab_size < info.vocab_size:
                yield Finding(
                    f"--vocab-size {vocab_size} is less than the {info.vocab_size} entries that "
                    f"{prefix} was made with",
                    {"vocab_size": info.vocab_size},
                )
        elif info.tokenizer_type != kind:
            yield Finding(
                f"--tokenizer-type {kind}, but {prefix} was made with {info.tokenizer_type}",
                f"--tokenizer-type {info.tokenizer_type}, with its own files if it has any",
            )
        elif (info.tokenizer_sha256, info.vocab_size) != (tokenizer.sha256, tokenizer.vocab_size):
            yield Finding(
                f"{named or f'--tokenizer-type {kind}'} ({tokenizer.vocab_size} entries) is not "
                f"the one that {prefix} was made with ({info.vocab_size} entries, sha256 "
                f"{info.tokenizer_sha256[:12]})",
                OTHER_TOKENIZER,
            )
        elif info.parse_special_tokens and not config.data.parse_special_tokens:
            yield Finding(
                f"{prefix} was made with --parse-special-tokens, and this run, whose checkpoints "
                "say how prompts are encoded, is without it",
                {"parse_special_tokens": True},
            )


def ids_fit_file(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """The numbers in the .bin file are wide enough for the tokenizer's ids."""
    tokenizer = tokenizer_or_none(config)
    for _, prefix, indexed in datasets_of(config):
        largest = int(np.iinfo(indexed.dtype).max)
        if tokenizer is not None and tokenizer.vocab_size > largest + 1:
            yield Finding(
                f"{prefix} holds ids up to {largest}, too few for the {tokenizer.vocab_size} "
                "entries of the tokenizer: it was made with another one",
                OTHER_TOKENIZER,
            )


TOKENIZER_FILE_RULES: tuple[Rule, ...] = (tokenizer_fits, tokenizer_made_data, ids_fit_file)


def build_tokenizer(config: RunConfig) -> Tokenizer | None:
    """The configured tokenizer; None when none is, or not all it needs is given.

    Flags that do not belong to its kind are left out: nothing_is_ignored reports them. Raises
    TokenizerError, OSError.
    """
    kind = config.data.tokenizer_type
    size = config.model.vocab_size
    flags = {field: getattr(config.data, field) for field in files_of(config)}
    if kind is None or None in flags.values() or (kind == "NullTokenizer" and size is None):
        return None
    if kind == "TikTokenizer":
        flags["tiktoken_pattern"] = config.data.tiktoken_pattern
    if kind not in NO_SPECIAL_TEXTS:
        flags["parse_special_tokens"] = config.data.parse_special_tokens
    return tokenizers.build_tokenizer(kind, **flags, vocab_size=size)


def tokenizer_or_none(config: RunConfig) -> Tokenizer | None:
    """The configured tokenizer; None too where it cannot be built, which tokenizer_fits reports."""
    try:
        return build_tokenizer(config)
    except (TokenizerError, OSError):
        return None


def files_of(config: RunConfig) -> tuple[str, ...]:
    """The fields that name the files of the configured kind of tokenizer."""
    return TOKENIZER_FILES.get(config.data.tokenizer_type, ())
