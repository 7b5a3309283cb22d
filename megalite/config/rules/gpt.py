"""Rules of a GPT. Imports no torch."""

from collections.abc import Iterator

from megalite.config.rules.data import datasets_of, other_splits, prefixes_of, tokens_of
from megalite.config.rules.disk import MAKE_DATA
from megalite.config.rules.finding import Finding, Rule, flag_of, wanted_splits, without_evaluation
from megalite.config.run import RunConfig, keys_where

LENGTHS = tuple(2**k for k in range(20, 2, -1))
"""Sequence lengths that are offered where the data has too few tokens."""


def norms_come_first(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """Post-norm is for BERT."""
    if config.model.post_norm:
        yield Finding(
            "--norm-placement post is for BERT; a GPT normalises the input of its sublayers",
            ("norm_placement", "architecture"),
            ({"norm_placement": "pre"},),
        )


def data_fills_splits(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """Documents and tokens for every split that the run reads, in every source."""
    needed = config.model.seq_length + 1
    for key, prefix, indexed in datasets_of(config):
        if not indexed.contiguous:
            continue  # only reading all of the index would tell, as building it does
        for split in wanted_splits(config):
            if config.data.words_of(split)[1] is not getattr(config.data, key):
                continue
            # The tokens of this split.
            whole = key != "data_path"
            if whole:
                tokens = indexed.num_tokens
                share = f"all {split} samples have"
            else:
                tokens = tokens_of(indexed, config.data.split).get(split, needed)
                share = f"--split {config.data.split} gives {split}"
            if tokens >= needed:
                continue
            # What would help.
            offers = [without_evaluation()] if split == "valid" else []
            flags = (key, "seq_length")
            if not whole:
                offers = [*other_splits(config, indexed, tokens_of, least=needed), *offers]
                flags = ("split", *flags)
            offers += [{"seq_length": length} for length in LENGTHS if length < tokens]
            yield Finding(
                f"{share} {tokens} tokens of {prefix} ({indexed.num_documents} documents), "
                f"but a sample needs --seq-length + 1 = {needed}",
                flags,
                (*offers, "more data"),
            )


def documents_are_ended(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """The flags that look for the token that ends a document find it, where PREFIX.json tells."""
    from megalite.data.indexed import DatasetError, DatasetInfo

    keys = [key for key in keys_where(lambda f: f.needs_eod) if getattr(config.data, key)]
    if not keys:
        return
    for key, prefixes in prefixes_of(config).items():
        for prefix in prefixes:
            try:
                info = DatasetInfo.read(prefix)
            except DatasetError:
                continue  # another rule reports it
            if info is None or info.append_eod is not False:
                continue
            given = ", ".join(map(flag_of, keys))
            yield Finding(
                f"{prefix} was made without --append-eod: {given} would find no end of a document "
                "in it",
                (key, *keys),
                (f"{MAKE_DATA} --append-eod", dict.fromkeys(keys, False)),
            )


GPT_RULES: tuple[Rule, ...] = (norms_come_first,)
GPT_FILE_RULES: tuple[Rule, ...] = (data_fills_splits, documents_are_ended)
