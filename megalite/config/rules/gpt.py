"""Rules of a GPT. Imports no torch."""

from collections.abc import Iterator

from megalite.config.rules.data import datasets_of, info_of, prefixes_of, short_splits
from megalite.config.rules.disk import MAKE_DATA
from megalite.config.rules.finding import Finding, Rule, each, flag_of
from megalite.config.run import RunConfig, keys_where

LENGTHS = tuple(2**k for k in range(20, 2, -1))
"""Sequence lengths that are offered where the data has too few tokens."""


def norms_come_first(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """Post-norm is for BERT."""
    if config.model.post_norm:
        yield Finding(
            "--norm-placement post is for BERT; a GPT normalises the input of its sublayers",
            {"norm_placement": "pre"},
        )


def data_fills_splits(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """Documents and tokens for every split that the run reads, in every source."""
    needed = config.model.seq_length + 1

    def count_tokens(indexed, first: int, end: int) -> int:
        return len(indexed.tokens(first, end))

    for key, prefix, indexed in datasets_of(config):
        if not indexed.contiguous:
            continue  # only reading all of the index would tell, as building it does
        for split, tokens, fixes in short_splits(config, key, indexed, count_tokens, least=needed):
            share = f"all {split} samples have"
            if key == "data_path":
                share = f"--split {config.data.split} gives {split}"
            yield Finding(
                f"{share} {tokens} tokens of {prefix} ({indexed.num_documents} documents), "
                f"but a sample needs --seq-length + 1 = {needed}",
                *fixes,
                *each("seq_length", [length for length in LENGTHS if length < tokens]),
                "more data",
            )


def documents_are_ended(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """The flags that look for the token that ends a document find it, where PREFIX.json tells."""
    keys = [key for key in keys_where(lambda f: f.needs_eod) if getattr(config.data, key)]
    if not keys:
        return
    given = ", ".join(map(flag_of, keys))
    for _, prefix in prefixes_of(config):
        info = info_of(prefix)
        if info is not None and info.append_eod is False:
            yield Finding(
                f"{prefix} was made without --append-eod: {given} would find no end of a document "
                "in it",
                f"{MAKE_DATA} --append-eod",
                dict.fromkeys(keys, False),
            )


GPT_RULES: tuple[Rule, ...] = (norms_come_first,)
GPT_FILE_RULES: tuple[Rule, ...] = (data_fills_splits, documents_are_ended)
