"""Rules that look at the data and its tokenizer. Imports no torch."""

import os
from collections.abc import Iterator

from megalite.config import RunConfig, options
from megalite.data.config import DataConfig
from megalite.rules.disk import neighbours
from megalite.rules.finding import PATHS, Finding, Rule, wanted_splits

MAKE_DATA = "make it with tools/preprocess_data.py"


def _prefixes(config: RunConfig) -> dict[str, list[str]]:
    """Prefixes that each field names; none for a field that cannot be read, which another rule tells."""
    from megalite.data.indexed import DatasetError
    from megalite.data.sources import parse_sources

    found = {}
    for key in PATHS:
        try:
            found[key] = [source.prefix for source in parse_sources(getattr(config.data, key) or ())]
        except DatasetError:
            found[key] = []
    return {} if config.data.mock_data else found


def _datasets(config: RunConfig) -> Iterator[tuple[str, str, object]]:
    """(field, prefix, IndexedDataset) of every dataset that can be opened."""
    from megalite.data.indexed import DatasetError, IndexedDataset

    for key, prefixes in _prefixes(config).items():
        for prefix in prefixes:
            try:
                yield key, prefix, IndexedDataset(prefix)
            except (DatasetError, OSError):
                continue


def data_files_are_sound(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """PREFIX.bin and PREFIX.idx exist, and fit each other as far as a quick look tells."""
    from megalite.data.indexed import DatasetError, IndexedDataset

    for key, prefixes in _prefixes(config).items():
        for prefix in prefixes:
            flag = "--" + key.replace("_", "-")
            missing = [prefix + suffix for suffix in (".bin", ".idx") if not os.path.isfile(prefix + suffix)]
            if missing:
                beside = [p for p in neighbours(prefix.removesuffix(".bin"), ".idx") if os.path.isfile(p + ".bin")]
                words = [tuple(p if w == prefix else w for w in getattr(config.data, key)) for p in beside]
                offers = (*({key: value} for value in words), MAKE_DATA)
                yield Finding(f"{flag} {prefix}: there is no {' and no '.join(missing)}", (key,), offers)
                continue
            try:
                IndexedDataset(prefix)
            except (DatasetError, OSError) as error:
                yield Finding(f"{flag} {prefix}: {error}", (key,), (MAKE_DATA,))


def data_fills_splits(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """Documents and tokens for every split that the run asks for, in every source."""
    needed = config.model.seq_length + 1
    for key, prefix, indexed in _datasets(config):
        for split in wanted_splits(config):
            if config.data.words_of(split)[1] is not getattr(config.data, key) or not indexed.contiguous:
                continue  # not for this split; or only reading all of the index would tell, as building it does
            whole, share = key != "data_path", f"--split {config.data.split} gives {split}"
            tokens = indexed.num_tokens if whole else _split_tokens(indexed, config.data.split).get(split, needed)
            if tokens >= needed:
                continue
            others = [s for s in ("90,10,0", "80,20,0", "50,50,0") if _fills(indexed, s, needed, wanted_splits(config))]
            shorter = [{"seq_length": n} for n in (2**k for k in range(20, 2, -1)) if n < tokens]
            quiet = [{"eval_interval": 0, "eval_iters": 0}] if split == "valid" else []
            yield Finding(
                f"{f'all {split} samples have' if whole else share} {tokens} tokens of {prefix} "
                f"({indexed.num_documents} documents), but a sample needs --seq-length + 1 = {needed}",
                (*(() if whole else ("split",)), key, "seq_length"),
                (*({"split": other} for other in others[:1] if not whole), *quiet, *shorter, "more data"),
            )


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


def tokenizer_fits(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """The tokenizer can be built, fits the vocabulary, and knows the end of a document if that is asked for."""
    from megalite.data.tokenizers import TokenizerError

    m, d = config.model, config.data
    try:
        tokenizer = build_tokenizer(d)
    except (TokenizerError, OSError) as error:
        beside = neighbours(d.tokenizer_model or "", ".model")
        offers = (*({"tokenizer_model": p + ".model"} for p in beside), "--tokenizer-model FILE.model")
        yield Finding(str(error), ("tokenizer_type", "tokenizer_model"), offers)
        return
    if tokenizer is None:
        return
    if m.vocab_size is not None and m.vocab_size < tokenizer.vocab_size:
        yield Finding(
            f"--vocab-size {m.vocab_size} is less than the {tokenizer.vocab_size} entries of the tokenizer",
            ("vocab_size", "tokenizer_type", "tokenizer_model"),
            ({"vocab_size": tokenizer.vocab_size}, {"vocab_size": None}),
        )
    for key in ("eod_mask_loss", "reset_position_ids", "reset_attention_mask"):
        try:
            _ = tokenizer.eod if getattr(d, key) else None
        except TokenizerError as error:
            found = f"{options()[key].flag} needs an end-of-document token: {error}"
            yield Finding(found, (key, "tokenizer_model"), ({key: False},))


def tokenizer_made_data(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """The tokenizer is the one that PREFIX.json says the data was made with; the data's ids fit the vocabulary."""
    from megalite.data.indexed import DatasetError, DatasetInfo
    from megalite.data.tokenizers import TokenizerError

    d, vocab_size = config.data, config.model.vocab_size
    for key, prefixes in _prefixes(config).items():
        for prefix in prefixes:
            try:
                info, tokenizer = DatasetInfo.read(prefix), build_tokenizer(d)
            except DatasetError as error:
                yield Finding(str(error), (key,), (MAKE_DATA,))
                continue
            except (TokenizerError, OSError):
                continue
            if info and tokenizer and info.tokenizer_type != d.tokenizer_type:
                yield Finding(
                    f"--tokenizer-type {d.tokenizer_type}, but {prefix} was made with {info.tokenizer_type}",
                    ("tokenizer_type", key),
                    (f"--tokenizer-type {info.tokenizer_type}, with its own files if it has any",),
                )
            elif info and tokenizer and info.tokenizer_sha256 != tokenizer.sha256:
                yield Finding(
                    f"--tokenizer-model {d.tokenizer_model} ({tokenizer.vocab_size} entries) is not the one that "
                    f"{prefix} was made with ({info.vocab_size} entries, sha256 {info.tokenizer_sha256[:12]})",
                    ("tokenizer_model", key),
                    ("give the model the data was made with, or make the data again with this one",),
                )
            elif info and not tokenizer and vocab_size and vocab_size < info.vocab_size:
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
        tokenizer = build_tokenizer(config.data)
    except (TokenizerError, OSError):
        return
    for key, prefix, indexed in _datasets(config) if tokenizer is not None else ():
        largest = int(np.iinfo(indexed.dtype).max)
        if tokenizer.vocab_size > largest + 1:
            yield Finding(
                f"{prefix} holds ids up to {largest}, too few for the {tokenizer.vocab_size} entries "
                "of the tokenizer: it was made with another one",
                (key, "tokenizer_type", "tokenizer_model"),
                ("give the model the data was made with, or make the data again with this one",),
            )


DATA_RULES: tuple[Rule, ...] = (
    data_files_are_sound,
    data_fills_splits,
    tokenizer_fits,
    tokenizer_made_data,
    ids_fit_file,
)


def build_tokenizer(data: DataConfig):
    """The configured tokenizer, None when none is or its model is not named. Raises TokenizerError, OSError."""
    from megalite.data.tokenizers import build_tokenizer

    unnamed = data.tokenizer_type == "SentencePieceTokenizer" and data.tokenizer_model is None
    if data.tokenizer_type is None or unnamed:
        return None
    return build_tokenizer(
        data.tokenizer_type, data.tokenizer_model if data.tokenizer_type != "ByteTokenizer" else None
    )
