"""From flags to a tokenizer."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

from megalite.data.config import TOKENIZER_FILES, DataConfig, TokenizerType
from megalite.data.tokenizers.base import ReferenceTokenizer, Tokenizer, TokenizerError
from megalite.data.tokenizers.fast import CheckedTokenizer
from megalite.data.tokenizers.huggingface import (
    BertWordPieceCase,
    BertWordPieceLowerCase,
    GPT2BPETokenizer,
    HuggingFaceTokenizer,
)
from megalite.data.tokenizers.plain import ByteTokenizer, NullTokenizer
from megalite.data.tokenizers.sentencepiece import SentencePieceTokenizer
from megalite.data.tokenizers.tiktoken import TikTokenizer

KINDS: dict[str, Callable[..., ReferenceTokenizer]] = {
    "SentencePieceTokenizer": SentencePieceTokenizer,
    "GPT2BPETokenizer": GPT2BPETokenizer,
    "BertWordPieceLowerCase": BertWordPieceLowerCase,
    "BertWordPieceCase": BertWordPieceCase,
    "HuggingFaceTokenizer": HuggingFaceTokenizer,
    "TikTokenizer": TikTokenizer,
    "NullTokenizer": NullTokenizer,
    "ByteTokenizer": ByteTokenizer,
}
TokenizerBackend = Literal["auto", "reference", "fast"]
"""Who encodes: the library that defines the ids, gigatoken, or gigatoken where it can."""


def build_tokenizer(
    tokenizer_type: TokenizerType,
    tokenizer_model: str | None = None,
    vocab_file: str | None = None,
    merge_file: str | None = None,
    vocab_size: int | None = None,
    backend: TokenizerBackend = "reference",
) -> Tokenizer:
    """The tokenizer of --tokenizer-type and the flags that name its files; `vocab_size` is read by NullTokenizer only.

    Raises TokenizerError with every flag that is missing or too much, or with what is wrong in a file, or, for the
    fast backend, with why gigatoken does not do.
    """
    given = {"tokenizer_model": tokenizer_model, "vocab_file": vocab_file, "merge_file": merge_file}
    problems = find_flag_problems(tokenizer_type, given, vocab_size)
    if problems:
        raise TokenizerError("; ".join(problems))
    files = [given[field] for field in TOKENIZER_FILES[tokenizer_type]]
    tokenizer = KINDS[tokenizer_type](
        *files, *([vocab_size] if tokenizer_type == "NullTokenizer" else [])
    )
    if backend == "reference":
        return tokenizer
    if backend not in get_args(TokenizerBackend):
        raise TokenizerError(
            f"--tokenizer-backend {backend}: known are {', '.join(get_args(TokenizerBackend))}"
        )
    try:
        return CheckedTokenizer(tokenizer)
    except TokenizerError as error:
        if backend == "fast":
            raise TokenizerError(f"--tokenizer-backend fast, {tokenizer_type}: {error}") from None
        tokenizer.why = str(error)
        return tokenizer


def configured_tokenizer(data: DataConfig, vocab_size: int | None) -> Tokenizer:
    """The tokenizer of a run. Raises TokenizerError when its flags do not fit together."""
    return build_tokenizer(
        data.tokenizer_type, data.tokenizer_model, data.vocab_file, data.merge_file, vocab_size
    )


def with_tokenizer(data: DataConfig, given: dict[str, str | None]) -> DataConfig:
    """The configuration with the tokenizer's kind and files that are `given`, by field; None: as it was. Files that it
    named belong to the kind that it named."""
    given = {field: value for field, value in given.items() if value is not None}
    if given.get("tokenizer_type", data.tokenizer_type) != data.tokenizer_type:
        given = {"tokenizer_model": None, "vocab_file": None, "merge_file": None} | given
    return replace(data, **given)


def trained_tokenizer(data: DataConfig, vocab_size: int) -> Tokenizer:
    """The tokenizer of a trained model with this vocabulary. Raises TokenizerError when it is not named, cannot be
    built or is larger than the model's vocabulary."""
    if data.tokenizer_type is None:
        raise TokenizerError(
            "the checkpoint's configuration names no tokenizer: give --tokenizer-type and its files"
        )
    tokenizer = configured_tokenizer(data, vocab_size)
    if tokenizer.vocab_size > vocab_size:
        raise TokenizerError(
            f"the tokenizer has {tokenizer.vocab_size} entries, the model only {vocab_size}: give the one that it was "
            "trained with"
        )
    return tokenizer


def find_flag_problems(
    kind: str, given: dict[str, str | None], vocab_size: int | None
) -> list[str]:
    """Every flag that is missing, too much, or names a file that is not there, a line each."""
    if kind not in KINDS:
        return [f"--tokenizer-type {kind}: known are {', '.join(KINDS)}"]
    problems = []
    for field, value in given.items():
        flag, wanted = "--" + field.replace("_", "-"), field in TOKENIZER_FILES[kind]
        if wanted and value is None:
            problems.append(f"--tokenizer-type {kind} needs {flag}")
        elif wanted and not Path(value).exists():
            problems.append(f"{flag} {value}: no such file. tools/train_tokenizer.py makes one")
        elif value is not None and not wanted:
            problems.append(f"{flag} {value}: {kind} does not read it; leave the flag out")
    if kind == "NullTokenizer" and vocab_size is None:
        problems.append(f"--tokenizer-type {kind} needs --vocab-size")
    return problems
