"""From flags to a tokenizer."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

from megalite.data import config
from megalite.data.config import TOKENIZER_FILES, DataConfig, TokenizerType
from megalite.data.tokenizers import huggingface, plain, sentencepiece, tiktoken
from megalite.data.tokenizers.base import Tokenizer, TokenizerError, missing_file
from megalite.data.tokenizers.fast import CheckedTokenizer
from megalite.data.tokenizers.tiktoken_patterns import ENCODINGS

KINDS: dict[str, Callable[..., Tokenizer]] = {
    "SentencePieceTokenizer": sentencepiece.SentencePieceTokenizer,
    "GPT2BPETokenizer": huggingface.GPT2BPETokenizer,
    "BertWordPieceLowerCase": huggingface.BertWordPieceLowerCase,
    "BertWordPieceCase": huggingface.BertWordPieceCase,
    "HuggingFaceTokenizer": huggingface.HuggingFaceTokenizer,
    "TikTokenizer": tiktoken.TikTokenizer,
    "NullTokenizer": plain.NullTokenizer,
    "ByteTokenizer": plain.ByteTokenizer,
}
TokenizerBackend = Literal["auto", "reference", "fast"]
"""Who encodes: the library that defines the ids, gigatoken, or gigatoken where it can."""


def build_tokenizer(
    tokenizer_type: TokenizerType,
    tokenizer_model: str | None = None,
    *,
    vocab_size: int | None = None,
    backend: TokenizerBackend = "reference",
    parse_special_tokens: bool = False,
    **given: str | None,
) -> Tokenizer:
    """Build the tokenizer of --tokenizer-type and the flags that belong to it.

    Args:
        tokenizer_type: a key of KINDS.
        tokenizer_model: its file, if TOKENIZER_FILES says that the kind has one.
        vocab_size: number of ids of a NullTokenizer; not read for other kinds.
        backend: who encodes.
        parse_special_tokens: take the text of a special token for that token.
        given: vocab_file and merge_file, as TOKENIZER_FILES lists them; tiktoken_pattern, a key of
            ENCODINGS, for TikTokenizer.

    Raises TokenizerError with every flag that is missing or too many, with what is wrong in a file,
    or, for the fast backend, with the reason why gigatoken cannot be used.
    """
    given["tokenizer_model"] = tokenizer_model
    problems = find_flag_problems(tokenizer_type, given, vocab_size, parse_special_tokens)
    if problems:
        raise TokenizerError("; ".join(problems))

    arguments = list(map(given.get, TOKENIZER_FILES[tokenizer_type]))
    if tokenizer_type == "NullTokenizer":
        arguments.append(vocab_size)
    if tokenizer_type == "TikTokenizer":
        arguments.append(given.get("tiktoken_pattern"))
    tokenizer = KINDS[tokenizer_type](*arguments)
    if parse_special_tokens:
        tokenizer.parse_special_tokens()

    if backend == "reference":
        return tokenizer
    if backend not in get_args(TokenizerBackend):
        known = ", ".join(get_args(TokenizerBackend))
        raise TokenizerError(f"--tokenizer-backend {backend}: known are {known}")
    try:
        return CheckedTokenizer(tokenizer)
    except TokenizerError as error:
        if backend == "fast":
            raise TokenizerError(f"--tokenizer-backend fast, {tokenizer_type}: {error}") from None
        tokenizer.why = str(error)
        return tokenizer


def find_flag_problems(
    kind: str, given: dict[str, str | None], vocab_size: int | None, parse_special_tokens: bool
) -> list[str]:
    """Every flag that is missing, does not belong to the kind, or has a value that cannot be."""
    if kind not in KINDS:
        return [f"--tokenizer-type {kind}: known are {', '.join(KINDS)}"]
    problems = []
    for field, value in (dict.fromkeys(TOKENIZER_FILES[kind]) | given).items():
        flag = "--" + field.replace("_", "-")
        if field in TOKENIZER_FILES[kind]:
            if value is None:
                problems.append(f"--tokenizer-type {kind} needs {flag}")
            elif not Path(value).exists():
                problems.append(missing_file(flag, value))
        elif field == "tiktoken_pattern" and kind == "TikTokenizer":
            if value is not None and value not in ENCODINGS:
                problems.append(f"{flag} {value}: known are {', '.join(ENCODINGS)}")
        elif value is not None:
            problems.append(f"{flag} {value}: {kind} does not read it; leave the flag out")
    if kind == "NullTokenizer" and vocab_size is None:
        problems.append(f"--tokenizer-type {kind} needs --vocab-size")
    if parse_special_tokens and (reason := config.NO_SPECIAL_TEXTS.get(kind)):
        problems.append(f"--parse-special-tokens: {reason}; leave the flag out")
    return problems


def tokenizer_fields(source: Any) -> dict[str, Any]:
    """Those of TOKENIZER_FIELDS that `source` has, as keyword arguments of `build_tokenizer`."""
    fields = config.TOKENIZER_FIELDS
    return {name: getattr(source, name) for name in fields if hasattr(source, name)}


def configured_tokenizer(data: DataConfig, vocab_size: int | None) -> Tokenizer:
    """Build the tokenizer of a run. Raises TokenizerError if its flags do not fit together."""
    return build_tokenizer(**tokenizer_fields(data), vocab_size=vocab_size)


def checkpoint_data_config(data: DataConfig, given: dict[str, Any], folder: Path) -> DataConfig:
    """The data section of a checkpoint's configuration, with the tokenizer to use now.

    Args:
        data: the data section that the checkpoint has.
        given: fields that replace those of the checkpoint, unless they are None or False. Another
            tokenizer_type comes with files of its own.
        folder: the checkpoint, iter_*.

    Raises TokenizerError if a file that the checkpoint names is not found: see `find_file`.
    """
    given = {field: value for field, value in given.items() if value not in (None, False)}
    kind = given.get("tokenizer_type", data.tokenizer_type)
    if kind != data.tokenizer_type:
        no_files = dict.fromkeys(("tokenizer_model", "vocab_file", "merge_file"))
        return replace(data, **no_files | {"tiktoken_pattern": None} | given)
    for field in set(TOKENIZER_FILES.get(kind, ())).difference(given):
        if recorded := getattr(data, field):
            given[field] = find_file(recorded, "--" + field.replace("_", "-"), folder)
    return replace(data, **given)


def find_file(recorded: str, flag: str, folder: Path) -> str:
    """Find a file that the configuration of the checkpoint in `folder` names.

    It is where the configuration says, or, after a move, in the folder of the checkpoints or in the
    folder that holds it: under its name or, if recorded as a relative path, under that path. Raises
    TokenizerError if it is in none of these.
    """
    path = Path(recorded)
    moved = path.name if path.is_absolute() else path
    beside = [parent / moved for parent in folder.absolute().parents[:2]]
    for candidate in filter(Path.exists, (path, *beside)):
        return str(candidate)
    origin = "" if path.is_absolute() else ", relative to the folder that its run was started in"
    raise TokenizerError(
        f"the configuration in {folder} names the tokenizer's file {recorded}{origin}, and there "
        f"is no such file: give {flag} FILE"
    )


def trained_tokenizer(data: DataConfig, vocab_size: int) -> Tokenizer:
    """Build the tokenizer of a trained model with a vocabulary of `vocab_size`.

    Raises TokenizerError if `data` names no tokenizer, it cannot be built, or it has more entries
    than the vocabulary.
    """
    if data.tokenizer_type is None:
        raise TokenizerError(
            "the checkpoint's configuration names no tokenizer: give --tokenizer-type and its files"
        )
    tokenizer = configured_tokenizer(data, vocab_size)
    if tokenizer.vocab_size > vocab_size:
        raise TokenizerError(
            f"the tokenizer has {tokenizer.vocab_size} entries, the model only {vocab_size}: give "
            "the one that it was trained with"
        )
    return tokenizer
