"""GPT-2's byte-level BPE, BERT's WordPiece and any tokenizer.json, by the tokenizers library."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megalite.data.tokenizers.base import (
    Encoded,
    ReferenceTokenizer,
    TokenizerError,
    digest,
    encoded,
    library,
    read,
    refuse_surrogates,
)

END_OF_TEXT = "<|endoftext|>"
USUAL_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "[SEP]")
"""End-of-document tokens that models have, the first that is there is taken where nothing else tells."""
BERT_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class LibraryTokenizer(ReferenceTokenizer):
    """A tokenizers.Tokenizer; a kind says how it is made and which token ends documents."""

    kind = ""

    def __init__(self, tokenizer, *contents: bytes):
        self._tokenizer = tokenizer
        self._vocabulary: dict[str, int] = tokenizer.get_vocab()
        self.vocab_size = max(self._vocabulary.values(), default=-1) + 1
        self.sha256 = digest(self.kind, *contents)

    def ids_of(self, tokens: Sequence[str]) -> list[int | None]:
        """Their ids; None for one that is not in the vocabulary."""
        return [self._vocabulary.get(token) for token in tokens]

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        """Ids of each text; nothing is put around them."""
        refuse_surrogates(texts)
        return encoded(
            text.ids
            for text in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        )

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these ids; special tokens give none."""
        return self._tokenizer.decode(
            [int(i) for i in ids if i != self.eod], skip_special_tokens=True
        )


class GPT2BPETokenizer(LibraryTokenizer):
    """GPT-2's byte-level BPE, from its encoder.json and vocab.bpe; <|endoftext|> ends documents.

    <|endoftext|> within a text is ordinary text. Decoding gives back the text that was encoded.
    Raises TokenizerError when the library or a file is missing, or the files are no such vocabulary.
    """

    kind = "GPT2BPETokenizer"

    def __init__(self, vocab_file: str | Path, merge_file: str | Path):
        tokenizers = library("tokenizers", self.kind)
        contents = read(vocab_file, "--vocab-file"), read(merge_file, "--merge-file")
        try:
            model = tokenizers.models.BPE.from_file(str(vocab_file), str(merge_file))
        except Exception as error:  # whatever the library makes of a broken file
            raise TokenizerError(
                f"--vocab-file {vocab_file} --merge-file {merge_file}: no byte-level BPE vocabulary: {error}"
            ) from None
        tokenizer = tokenizers.Tokenizer(model)
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        super().__init__(tokenizer, *contents)
        lacking = sorted(
            set(tokenizers.pre_tokenizers.ByteLevel.alphabet()) - self._vocabulary.keys()
        )
        if lacking:  # the library would drop them from the text and say nothing
            raise TokenizerError(
                f"--vocab-file {vocab_file}: no byte-level vocabulary, {len(lacking)} of the 256 bytes are not in it"
            )
        if END_OF_TEXT not in self._vocabulary:
            raise TokenizerError(
                f"--vocab-file {vocab_file}: has no {END_OF_TEXT} to end documents with"
            )
        self.eod = self._vocabulary[END_OF_TEXT]

    def load_fast(self, gigatoken):
        """Byte-level BPE is what it is best at."""
        return gigatoken.Tokenizer.from_json(self._tokenizer.to_str())


class BertWordPieceTokenizer(LibraryTokenizer):
    """BERT's WordPiece, from its vocab.txt; [SEP] ends documents. The text of a special token is ordinary text.

    Encoding cleans the text (control characters, white space) and, in lower case, strips accents, so that decoding
    gives the words back but not the text. Raises TokenizerError when the library or the file is missing, or the file
    lacks a special token.
    """

    lowercase = True

    def __init__(self, vocab_file: str | Path):
        self.kind = "BertWordPieceLowerCase" if self.lowercase else "BertWordPieceCase"
        tokenizers = library("tokenizers", self.kind)
        content = read(vocab_file, "--vocab-file")
        vocabulary = _pieces(content, vocab_file)
        tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
        tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=self.lowercase)
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = tokenizers.decoders.WordPiece()
        super().__init__(tokenizer, content)
        self._refuse_capitals(vocab_file)
        self.special: dict[str, int] = {token: vocabulary[token] for token in BERT_SPECIAL}
        """Ids of [PAD], [UNK], [CLS], [SEP] and [MASK]."""
        self.starts_word = _beginnings(self._vocabulary, self.vocab_size)
        self.eod = self.special["[SEP]"]

    def _refuse_capitals(self, path: str | Path) -> None:
        """A vocabulary of text as it is wastes its capital letters on lower-cased text, and gives [UNK] for more."""
        capitals = [
            piece
            for piece in self._vocabulary
            if piece != piece.lower() and piece not in BERT_SPECIAL
        ]
        if self.lowercase and 100 * len(capitals) > self.vocab_size:
            raise TokenizerError(
                f"--vocab-file {path}: {len(capitals)} of {self.vocab_size} pieces have capital letters, such as "
                f"{capitals[0]!r}, but {self.kind} lowers the text: use BertWordPieceCase, or a vocabulary of "
                "lower-cased text (tools/train_tokenizer.py --kind wordpiece --lowercase)"
            )


def _beginnings(vocabulary: dict[str, int], size: int, continuing: str = "##") -> np.ndarray:
    """bool [v]: whether a piece begins a word, which all do but those that start with `continuing`."""
    starts = np.zeros(size, bool)
    starts[[i for piece, i in vocabulary.items() if not piece.startswith(continuing)]] = True
    return starts


class BertWordPieceLowerCase(BertWordPieceTokenizer):
    """WordPiece of lower-cased text."""


class BertWordPieceCase(BertWordPieceTokenizer):
    """WordPiece of text as it is."""

    lowercase = False


def _pieces(content: bytes, path: str | Path) -> dict[str, int]:
    """The ids of a vocab.txt: the numbers of its lines. Raises TokenizerError."""
    try:
        lines = content.decode().split("\n")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"--vocab-file {path}: not UTF-8 text ({error.reason})") from None
    lines = [line.removesuffix("\r") for line in (lines[:-1] if lines[-1] == "" else lines)]
    vocabulary = {piece: number for number, piece in enumerate(lines)}
    lacking = [token for token in BERT_SPECIAL if token not in vocabulary]
    if lacking:
        raise TokenizerError(
            f"--vocab-file {path}: no BERT vocabulary, one piece a line: it lacks {' '.join(lacking)}"
        )
    return vocabulary


class HuggingFaceTokenizer(LibraryTokenizer):
    """A tokenizer.json, or a folder with one; nothing is downloaded.

    Documents end with the eos_token that tokenizer_config.json beside it names, else with one of the usual names. The
    text of a special token is ordinary text; other added tokens are found in texts, as the file asks for. Raises
    TokenizerError when the library or the file is missing, or the file is no tokenizer.
    """

    kind = "HuggingFaceTokenizer"

    def __init__(self, path: str | Path):
        tokenizers = library("tokenizers", self.kind)
        self._path = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
        content = read(self._path, "--tokenizer-model")
        try:
            tokenizer = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as error:  # whatever the library makes of a broken file
            raise TokenizerError(
                f"--tokenizer-model {self._path}: no tokenizer.json: {error}"
            ) from None
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        super().__init__(tokenizer, content)
        self.marks = tuple(
            t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special
        )

    @property
    def starts_word(self) -> np.ndarray | None:
        """bool [v]: whether a piece begins a word; None where the kind of model does not mark that."""
        model = json.loads(self._tokenizer.to_str())["model"]
        if model.get("type") != "WordPiece":
            return None
        return _beginnings(self._vocabulary, self.vocab_size, model["continuing_subword_prefix"])

    @property
    def eod(self) -> int:
        """Id of the token that ends documents. Raises TokenizerError when there is none."""
        named = self._named_end()
        for token in (named,) if named else USUAL_ENDS:
            if token in self._vocabulary:
                return self._vocabulary[token]
        wanted = named or ", ".join(USUAL_ENDS)
        raise TokenizerError(
            f"{self._path}: no token ends documents: {wanted} is not in the vocabulary. Name one as eos_token in "
            "tokenizer_config.json beside it"
        )

    def _named_end(self) -> str | None:
        """The eos_token of tokenizer_config.json."""
        path = self._path.with_name("tokenizer_config.json")
        if not path.is_file():
            return None
        try:
            token = json.loads(path.read_bytes()).get("eos_token")
        except (ValueError, AttributeError):
            raise TokenizerError(f"{path}: not a JSON object") from None
        return token.get("content") if isinstance(token, dict) else token

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these ids; special tokens give none."""
        try:
            ends = {self.eod}
        except TokenizerError:
            ends = set()
        return self._tokenizer.decode(
            [int(i) for i in ids if i not in ends], skip_special_tokens=True
        )

    def load_fast(self, gigatoken):
        """Byte-level BPE, and BPE as SentencePiece does it."""
        return gigatoken.Tokenizer.from_json(self._tokenizer.to_str())
