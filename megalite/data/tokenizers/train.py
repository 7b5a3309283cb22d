"""Train tokenizers: the same texts give the same files. Libraries are imported where used."""

import io
import itertools
import json
from collections.abc import Iterable, Iterator
from typing import Literal

from megalite.data.tokenizers.base import TokenizerError, import_library
from megalite.data.tokenizers.huggingface import BERT_SPECIAL, END_OF_TEXT


def train_sentencepiece(
    texts: Iterable[str], vocab_size: int, model_type: Literal["bpe", "unigram"] = "bpe"
) -> bytes:
    """Train a SentencePiece model and return the content of its .model file.

    Decoding gives back the text that was encoded, white space and line breaks included: nothing is
    normalized, and characters that the vocabulary lacks are encoded as bytes. One exception:
    U+2581, SentencePiece's sign for a space, comes back as a space. Ids: 0 unknown, 1 begin,
    2 end of document, 3 padding, then 256 bytes, then pieces. Raises TokenizerError if the texts do
    not give this many pieces, or are empty, and whatever error reading them raises.
    """
    sentencepiece = import_library("sentencepiece", "SentencePieceTokenizer")
    errors = []
    lines = _lines(texts, errors)
    first = next(lines, None)
    if first is None:
        raise TokenizerError("no text to train a tokenizer on: the input is empty")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=itertools.chain([first], lines),
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            max_sentence_length=1 << 30,
            num_threads=1,
            minloglevel=3,
        )
    except RuntimeError as error:
        if not errors:
            reason = str(error).rsplit("] ", 1)[-1].strip() or error
            given = f"--vocab-size {vocab_size}"
            raise TokenizerError(f"{given} does not fit this text: {reason}") from None
    if errors:
        raise errors[0]
    return model.getvalue()


def train_bpe(texts: Iterable[str], vocab_size: int) -> tuple[bytes, bytes]:
    """Train a byte-level BPE and return the contents of its vocab.json and merges.txt.

    The files are GPT-2's, for GPT2BPETokenizer. Ids: 0 <|endoftext|>, then 256 bytes, then merged
    tokens. Raises TokenizerError if the texts do not give this many tokens.
    """
    tokenizers = import_library("tokenizers", "byte-level BPE")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    vocabulary = _in_order(tokenizer, vocab_size)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    vocab_json = json.dumps(vocabulary, ensure_ascii=False)
    merges_txt = "\n".join(["#version: 0.2", *map(" ".join, merges), ""])
    return vocab_json.encode(), merges_txt.encode()


def train_wordpiece(texts: Iterable[str], vocab_size: int, lowercase: bool = False) -> bytes:
    """Train BERT's WordPiece and return the content of its vocab.txt.

    The file is for BertWordPieceCase or, with `lowercase`, for BertWordPieceLowerCase. `texts` is
    iterated twice. Ids: [PAD], [UNK], [CLS], [SEP], [MASK], then single characters, then longer
    tokens. Raises TokenizerError if the texts do not give this many tokens, or have more characters
    than that.
    """
    tokenizers = import_library("tokenizers", "WordPiece")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    first = list(dict.fromkeys([*BERT_SPECIAL, *_characters(texts, tokenizer)]))
    if len(first) >= vocab_size:
        raise TokenizerError(
            f"--vocab-size {vocab_size} does not fit this text: special tokens and characters "
            f"are {len(first)} already"
        )
    # The library numbers characters in the order of a hash table, which differs between processes,
    # and breaks ties by number. Characters that it gets as special tokens have a fixed order.
    trainer = tokenizers.trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=first, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return "".join(piece + "\n" for piece in _in_order(tokenizer, vocab_size)).encode()


def _characters(texts: Iterable[str], tokenizer) -> list[str]:
    """Sorted characters of the texts; then, with ##, those that occur within a word."""
    characters = set()
    pairs = set()
    for text in texts:
        normal = tokenizer.normalizer.normalize_str(text)
        characters.update(normal)
        pairs.update(itertools.pairwise(normal))
    split_into_words = tokenizer.pre_tokenizer.pre_tokenize_str
    in_words = sorted(c for c in characters if split_into_words(c))
    continuing = set()
    for before, c in pairs:
        if before.strip() and len(split_into_words(before + c)) == 1:
            continuing.add(c)
    return [*in_words, *("##" + c for c in in_words if c in continuing)]


def _in_order(tokenizer, vocab_size: int) -> dict[str, int]:
    """The vocabulary, sorted by id. Raises TokenizerError unless it has this size."""
    vocabulary = dict(sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1]))
    if len(vocabulary) != vocab_size:
        raise TokenizerError(
            f"--vocab-size {vocab_size} does not fit this text: it gives {len(vocabulary)} pieces, "
            "special tokens and single characters among them"
        )
    return vocabulary


def _lines(texts: Iterable[str], errors: list[Exception]) -> Iterator[str]:
    """The lines of texts. Appends an error of the texts to a list: SentencePiece would drop it."""
    try:
        for text in texts:
            yield from filter(None, text.split("\n"))
    except Exception as error:
        errors.append(error)
        raise
