"""Training tokenizers: the same result for the same texts. Libraries are imported where used."""

import io
import itertools
import json
from collections.abc import Iterable, Iterator
from typing import Literal

from megalite.data.tokenizers.base import TokenizerError, library
from megalite.data.tokenizers.huggingface import BERT_SPECIAL, END_OF_TEXT


def train_sentencepiece(
    texts: Iterable[str], vocab_size: int, model_type: Literal["bpe", "unigram"] = "bpe"
) -> bytes:
    """Train a SentencePiece model: the content of a .model file, the same for the same texts.

    Decoding gives back the text that was encoded, white space and line breaks included: nothing is normalised, and
    what the vocabulary lacks is spelt in bytes. (One exception: U+2581, SentencePiece's own sign for a space, comes
    back as a space.) Ids: 0 unknown, 1 begin, 2 end of document, 3 padding, then 256 bytes, then pieces.
    Raises TokenizerError when the texts do not give this many pieces, or are empty.
    """
    sentencepiece = library("sentencepiece", "SentencePieceTokenizer")
    lines = _Lines(texts)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
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
        lines.reraise()
        if lines.count == 0:
            raise TokenizerError("no text to train a tokenizer on: the input is empty") from None
        reason = str(error).rsplit("] ", 1)[-1].strip()
        raise TokenizerError(
            f"--vocab-size {vocab_size} does not fit this text: {reason or error}"
        ) from None
    lines.reraise()
    return model.getvalue()


def train_bpe(texts: Iterable[str], vocab_size: int) -> tuple[bytes, bytes]:
    """Train a byte-level BPE: the contents of GPT-2's vocab.json and merges.txt, for GPT2BPETokenizer.

    Ids: 0 <|endoftext|>, then 256 bytes, then pieces. Raises TokenizerError when the texts do not give this many
    pieces.
    """
    tokenizers = library("tokenizers", "byte-level BPE")
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
    lines = [
        "#version: 0.2",
        *(" ".join(pair) if isinstance(pair, list) else pair for pair in merges),
    ]
    return json.dumps(vocabulary, ensure_ascii=False).encode(), ("\n".join(lines) + "\n").encode()


def train_wordpiece(texts: Iterable[str], vocab_size: int, lowercase: bool = False) -> bytes:
    """Train BERT's WordPiece: the content of a vocab.txt, for BertWordPieceCase or, with lowercase, ...LowerCase.

    The texts are gone through twice. Ids: 0 [PAD], [UNK], [CLS], [SEP], [MASK], then single characters, then pieces.
    Raises TokenizerError when the texts do not give this many pieces, or have more characters than that.
    """
    tokenizers = library("tokenizers", "WordPiece")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    letters = _letters(texts, tokenizer)
    first = [*BERT_SPECIAL, *(letter for letter in letters if letter not in BERT_SPECIAL)]
    if len(first) >= vocab_size:
        raise TokenizerError(
            f"--vocab-size {vocab_size} does not fit this text: special tokens and characters are {len(first)} already"
        )
    # The library numbers the letters in the order of a hash table, another one in each process, and breaks ties by
    # number: given to it as special tokens, they have a fixed order.
    trainer = tokenizers.trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=first, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return "".join(piece + "\n" for piece in _in_order(tokenizer, vocab_size)).encode()


def _letters(texts: Iterable[str], tokenizer) -> list[str]:
    """Characters of the texts as pieces: those of all positions, then, with ##, those that continue a word."""
    letters, pairs = set(), set()
    for text in texts:
        normal = tokenizer.normalizer.normalize_str(text)
        letters.update(normal)
        pairs.update(itertools.pairwise(normal))
    continuing = {
        b
        for a, b in pairs
        if len(tokenizer.pre_tokenizer.pre_tokenize_str(a + b)) == 1 and a.strip()
    }
    words = sorted(c for c in letters if tokenizer.pre_tokenizer.pre_tokenize_str(c))
    return [*words, *("##" + c for c in sorted(continuing.intersection(words)))]


def _in_order(tokenizer, vocab_size: int) -> dict[str, int]:
    """The vocabulary by id. Raises TokenizerError unless it has this size."""
    vocabulary = dict(sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1]))
    if len(vocabulary) != vocab_size:
        raise TokenizerError(
            f"--vocab-size {vocab_size} does not fit this text: it gives {len(vocabulary)} pieces, special tokens "
            "and single characters among them"
        )
    return vocabulary


class _Lines:
    """The lines of texts. Remembers the error that ends them early, since SentencePiece drops it."""

    def __init__(self, texts: Iterable[str]):
        self._texts = texts
        self._error: Exception | None = None
        self.count = 0

    def __iter__(self) -> Iterator[str]:
        try:
            for text in self._texts:
                for line in filter(None, text.split("\n")):
                    self.count += 1
                    yield line
        except Exception as error:
            self._error = error
            raise

    def reraise(self) -> None:
        if self._error is not None:
            raise self._error
