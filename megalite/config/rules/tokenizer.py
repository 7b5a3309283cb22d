"""Rules of the tokenizer: its flags, its files, and whether it made the data. Imports no torch."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from megalite.config.rules.bert import MASKING_TOKENIZERS
from megalite.config.rules.data import datasets_of, prefixes_of
from megalite.config.rules.disk import MAKE_DATA, neighbours
from megalite.config.rules.finding import EXAMPLES, Finding, Rule
from megalite.config.run import RunConfig
from megalite.data.config import NO_SPECIAL_TEXTS, TOKENIZER_FILES

OTHER_TOKENIZER = "give the tokenizer the data was made with, or make the data again with this one"


def tokenizer_is_whole(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """Every file that the kind of tokenizer is made of is named; NullTokenizer knows its size. Reads no file."""
    d = config.data
    for field in TOKENIZER_FILES.get(d.tokenizer_type, ()):
        if getattr(d, field) is None:
            flag = _flag(field)
            yield Finding(
                f"--tokenizer-type {d.tokenizer_type} needs {flag}",
                ("tokenizer_type", field),
                (f"{flag} FILE",),
            )
    if d.tokenizer_type == "NullTokenizer" and config.model.vocab_size is None and not d.mock_data:
        yield Finding(
            "--tokenizer-type NullTokenizer needs --vocab-size, the ids and one more that ends documents",
            ("tokenizer_type", "vocab_size"),
            ({"vocab_size": EXAMPLES["vocab_size"]},),
        )


def tokenizer_fits(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """The tokenizer can be built, fits the vocabulary, and knows the end of a document if that is asked for."""
    from megalite.data.tokenizers import TokenizerError

    m, d = config.model, config.data
    missing = [field for field in _files(config) if not os.path.exists(getattr(d, field) or "")]
    for field in missing:
        if path := getattr(d, field):
            offers = (*_similar(config, field, path), f"{_flag(field)} FILE")
            found = f"{_flag(field)} {path}: no such file. tools/train_tokenizer.py makes one"
            yield Finding(found, ("tokenizer_type", field), offers)
    if missing:
        return
    try:
        tokenizer = build_tokenizer(config)
    except (TokenizerError, OSError) as error:
        fields = _files(config)
        offers = [f"{_flag(field)} FILE" for field in fields]
        if d.tokenizer_type == "TikTokenizer":
            fields = (*fields, "tiktoken_pattern")
            offers.append("--tiktoken-pattern NAME")
        offers.append("another --tokenizer-type")
        yield Finding(str(error), ("tokenizer_type", *fields), tuple(offers))
        return
    if tokenizer is None:
        return
    if m.vocab_size is not None and m.vocab_size < tokenizer.vocab_size:
        yield Finding(
            f"--vocab-size {m.vocab_size} is less than the {tokenizer.vocab_size} entries of the tokenizer",
            ("vocab_size", "tokenizer_type", *_files(config)),
            ({"vocab_size": tokenizer.vocab_size}, {"vocab_size": None}),
        )
    yield from _masks(config, tokenizer)
    for key in ("eod_mask_loss", "reset_position_ids", "reset_attention_mask"):
        try:
            _ = tokenizer.eod if getattr(d, key) else None
        except TokenizerError as error:
            found = f"{_flag(key)} needs an end-of-document token: {error}"
            yield Finding(found, (key, *_files(config)), ({key: False},))


def _masks(config: RunConfig, tokenizer) -> Iterator[Finding]:
    """A BERT's tokenizer has the tokens that frame and mask samples, and knows words where whole ones are masked."""
    from megalite.data.masking import special_ids
    from megalite.data.tokenizers import TokenizerError

    if (
        not config.is_bert
        or config.data.mock_data
        or config.data.tokenizer_type not in MASKING_TOKENIZERS
    ):
        return  # the flags alone tell
    try:
        special_ids(tokenizer)
    except TokenizerError as error:
        yield Finding(
            str(error),
            ("architecture", "tokenizer_type", *_files(config)),
            ("another --tokenizer-type",),
        )
    if config.bert.whole_word_mask and getattr(tokenizer, "starts_word", None) is None:
        yield Finding(
            f"--whole-word-mask: --tokenizer-type {config.data.tokenizer_type} does not tell which tokens begin a word",
            ("whole_word_mask", "tokenizer_type"),
            (
                {"whole_word_mask": False},
                "--tokenizer-type BertWordPieceLowerCase or BertWordPieceCase",
            ),
        )


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
    """The tokenizer is the one that PREFIX.json says the data was made with; the data's ids fit the vocabulary."""
    from megalite.data.indexed import DatasetError, DatasetInfo
    from megalite.data.tokenizers import TokenizerError

    try:
        tokenizer = build_tokenizer(config)
    except (TokenizerError, OSError):
        return
    for key, prefixes in prefixes_of(config).items():
        for prefix in prefixes:
            try:
                if info := DatasetInfo.read(prefix):
                    yield from _made_by(config, tokenizer, key, prefix, info)
            except DatasetError as error:
                yield Finding(str(error), (key,), (MAKE_DATA,))


def _made_by(config: RunConfig, tokenizer, key: str, prefix: str, info) -> Iterator[Finding]:
    """The description `info` of the dataset that field `key` names is that of this tokenizer, if there is one."""
    d, vocab_size = config.data, config.model.vocab_size
    given = f"--tokenizer-type {d.tokenizer_type}"
    if tokenizer and info.tokenizer_type != d.tokenizer_type:
        yield Finding(
            f"{given}, but {prefix} was made with {info.tokenizer_type}",
            ("tokenizer_type", key),
            (f"--tokenizer-type {info.tokenizer_type}, with its own files if it has any",),
        )
    elif tokenizer and (info.tokenizer_sha256, info.vocab_size) != (
        tokenizer.sha256,
        tokenizer.vocab_size,
    ):
        named = " ".join(f"{_flag(field)} {getattr(d, field)}" for field in _files(config)) or given
        yield Finding(
            f"{named} ({tokenizer.vocab_size} entries) is not the one that {prefix} was made with "
            f"({info.vocab_size} entries, sha256 {info.tokenizer_sha256[:12]})",
            (*_files(config), key),
            (OTHER_TOKENIZER,),
        )
    elif tokenizer and info.parse_special_tokens and not d.parse_special_tokens:
        yield Finding(
            f"{prefix} was made with --parse-special-tokens, and this run, whose checkpoints say "
            "how prompts are encoded, is without it",
            ("parse_special_tokens", key),
            ({"parse_special_tokens": True},),
        )
    elif not tokenizer and vocab_size and vocab_size < info.vocab_size:
        yield Finding(
            f"--vocab-size {vocab_size} is less than the {info.vocab_size} entries that {prefix} was made with",
            ("vocab_size", key),
            ({"vocab_size": info.vocab_size},),
        )


def ids_fit_file(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """The numbers in the .bin file are wide enough for the tokenizer's ids."""
    import numpy as np

    from megalite.data.tokenizers import TokenizerError

    try:
        tokenizer = build_tokenizer(config)
    except (TokenizerError, OSError):
        return
    for key, prefix, indexed in datasets_of(config) if tokenizer is not None else ():
        largest = int(np.iinfo(indexed.dtype).max)
        if tokenizer.vocab_size > largest + 1:
            yield Finding(
                f"{prefix} holds ids up to {largest}, too few for the {tokenizer.vocab_size} entries "
                "of the tokenizer: it was made with another one",
                (key, "tokenizer_type", *_files(config)),
                (OTHER_TOKENIZER,),
            )


TOKENIZER_FILE_RULES: tuple[Rule, ...] = (tokenizer_fits, tokenizer_made_data, ids_fit_file)


def build_tokenizer(config: RunConfig):
    """The configured tokenizer, None when none is or not all it needs is given. Raises TokenizerError, OSError.

    Flags that do not belong to its kind are left out here: nothing_is_ignored reports them.
    """
    from megalite.data.tokenizers import build_tokenizer

    kind, size = config.data.tokenizer_type, config.model.vocab_size
    flags = {field: getattr(config.data, field) for field in _files(config)}
    if kind is None or None in flags.values() or (kind == "NullTokenizer" and size is None):
        return None
    if kind == "TikTokenizer":
        flags["tiktoken_pattern"] = config.data.tiktoken_pattern
    if kind not in NO_SPECIAL_TEXTS:
        flags["parse_special_tokens"] = config.data.parse_special_tokens
    return build_tokenizer(kind, **flags, vocab_size=size)


def _files(config: RunConfig) -> tuple[str, ...]:
    return TOKENIZER_FILES.get(config.data.tokenizer_type, ())


def _flag(field: str) -> str:
    return "--" + field.replace("_", "-")
