"""GPT-2's byte-level BPE, BERT's WordPiece and any tokenizer.json, by the tokenizers library."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megalite.data.tokenizers import base
from megalite.data.tokenizers.base import Encoded, TokenizerError

END_OF_TEXT = "<|endoftext|>"
USUAL_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "[SEP]")
"""Usual end-of-document tokens. The first in the vocabulary is taken if no file names one."""
TOKENIZER_JSON = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
PUBLISHED_FILES = (
    TOKENIZER_JSON,
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
"""Files of a tokenizer in a folder of Hugging Face."""
BERT_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class LibraryTokenizer(base.Tokenizer):
    """A tokenizers.Tokenizer. Subclasses build it and say which token ends documents."""

    special_texts: tuple[str, ...] = ()
    """Tokens of the vocabulary that a text can contain with `parse_special_tokens`."""

    def __init__(self, tokenizer, *contents: bytes):
        self._tokenizer = tokenizer
        self._vocabulary: dict[str, int] = tokenizer.get_vocab()
        self.vocab_size = max(self._vocabulary.values(), default=-1) + 1
        self.sha256 = base.digest(type(self).__name__, *contents)

    @classmethod
    def library(cls):
        """The tokenizers library. Raises TokenizerError if it is not installed."""
        return base.import_library("tokenizers", cls.__name__)

    def ids_of(self, tokens: Sequence[str]) -> list[int | None]:
        """Ids of tokens; None for a token that is not in the vocabulary."""
        return list(map(self._vocabulary.get, tokens))

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        """Encode texts, without special tokens around them."""
        base.refuse_surrogates(texts)
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return base.pack_ids(encoding.ids for encoding in encodings)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of these ids. Special tokens have no text."""
        kept = [int(i) for i in ids if i != self.eod_or_none]
        return self._tokenizer.decode(kept, skip_special_tokens=True)

    def parse_special_tokens(self) -> None:
        """From now on, take the text of `special_texts` for the tokens."""
        self._tokenizer.add_special_tokens(list(self.special_texts))
        self.reserved_texts = self.special_texts

    def _to_json(self, processor=None) -> bytes:
        """The content of a tokenizer.json with `special_texts` as special tokens. processor: what
        frames a text."""
        copy = self.library().Tokenizer.from_str(self._tokenizer.to_str())
        copy.add_special_tokens(list(self.special_texts))
        if processor is not None:
            copy.post_processor = processor
        return copy.to_str(pretty=True).encode()

    def load_fast(self, gigatoken):
        """Load the tokenizer.json into gigatoken: byte-level BPE, and BPE with byte fallback."""
        return gigatoken.Tokenizer.from_json(self._tokenizer.to_str())

    def _word_starts(self, continuing: str) -> np.ndarray:
        """bool [v]: whether a token begins a word, that is, does not start with `continuing`."""
        starts = np.zeros(self.vocab_size, bool)
        for token, i in self._vocabulary.items():
            starts[i] = not token.startswith(continuing)
        return starts


class GPT2BPETokenizer(LibraryTokenizer):
    """GPT-2's byte-level BPE, from its encoder.json and vocab.bpe; <|endoftext|> ends documents.

    Decoding gives back the text that was encoded. Raises TokenizerError if the library or a file
    is missing, or the files are not such a vocabulary.
    """

    special_texts = (END_OF_TEXT,)

    def __init__(self, vocab_file: str | Path, merge_file: str | Path):
        library = self.library()
        vocab = base.read_file(vocab_file, "--vocab-file")
        merges = base.read_file(merge_file, "--merge-file")
        given = f"--vocab-file {vocab_file}"
        try:
            model = library.models.BPE.from_file(str(vocab_file), str(merge_file))
        except Exception as error:  # the library has no error type of its own
            raise TokenizerError(
                f"{given} --merge-file {merge_file}: no byte-level BPE vocabulary: {error}"
            ) from None
        tokenizer = library.Tokenizer(model)
        tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = library.decoders.ByteLevel()
        super().__init__(tokenizer, vocab, merges)
        missing = set(library.pre_tokenizers.ByteLevel.alphabet()) - self._vocabulary.keys()
        if missing:  # the library would drop these bytes from texts without an error
            raise TokenizerError(
                f"{given}: no byte-level vocabulary, {len(missing)} of the 256 bytes are not in it"
            )
        if END_OF_TEXT not in self._vocabulary:
            raise TokenizerError(f"{given}: has no {END_OF_TEXT} to end documents with")
        self.eod = self._vocabulary[END_OF_TEXT]
        self._files = {"vocab.json": vocab, "merges.txt": merges}

    def huggingface_files(self) -> dict[str, bytes]:
        """tokenizer.json, its settings, and the vocabulary."""
        tokens = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
        settings = base.tokenizer_config("GPT2Tokenizer", **tokens, add_prefix_space=False)
        files = {TOKENIZER_JSON: self._to_json(), TOKENIZER_CONFIG: settings}
        return files | self._files


class BertWordPieceLowerCase(LibraryTokenizer):
    """BERT's WordPiece of lower-cased text, from its vocab.txt; [SEP] ends documents.

    Encoding removes control characters, changes white space and, in lower case, strips accents:
    decoding gives back the words but not the text. Raises TokenizerError if the library or the file
    is missing, or the file lacks a special token.
    """

    lowercase = True
    special_texts = BERT_SPECIAL

    def __init__(self, vocab_file: str | Path):
        library = self.library()
        content = base.read_file(vocab_file, "--vocab-file")
        vocabulary = _read_vocabulary(content, vocab_file)
        tokenizer = library.Tokenizer(library.models.WordPiece(vocabulary, unk_token="[UNK]"))
        tokenizer.normalizer = library.normalizers.BertNormalizer(lowercase=self.lowercase)
        tokenizer.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = library.decoders.WordPiece()
        super().__init__(tokenizer, content)
        self._content = content
        self.starts_word = self._word_starts("##")
        self.eod = vocabulary["[SEP]"]
        # Refuse a cased vocabulary for lower-cased text: much of it would become [UNK].
        words = vocabulary.keys() - set(BERT_SPECIAL)
        capitals = sorted(word for word in words if word != word.lower())
        if self.lowercase and 100 * len(capitals) > self.vocab_size:
            raise TokenizerError(
                f"--vocab-file {vocab_file}: {len(capitals)} of {self.vocab_size} pieces have "
                f"capital letters, such as {capitals[0]!r}, but {type(self).__name__} lowers the "
                "text: use BertWordPieceCase, or a vocabulary of lower-cased text "
                "(tools/train_tokenizer.py --kind wordpiece --lowercase)"
            )

    def huggingface_files(self) -> dict[str, bytes]:
        """tokenizer.json that frames texts in [CLS] and [SEP], its settings, and the vocabulary."""
        frame = self.library().processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[(name, self._vocabulary[name]) for name in ("[CLS]", "[SEP]")],
        )
        names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
        tokens = dict(zip(names, BERT_SPECIAL, strict=True))
        kept = {"do_lower_case": self.lowercase, "strip_accents": None}
        settings = base.tokenizer_config("BertTokenizer", **tokens, **kept)
        files = {TOKENIZER_JSON: self._to_json(frame), TOKENIZER_CONFIG: settings}
        return files | {"vocab.txt": self._content}


class BertWordPieceCase(BertWordPieceLowerCase):
    """BERT's WordPiece of text as it is."""

    lowercase = False


def _read_vocabulary(content: bytes, path: str | Path) -> dict[str, int]:
    """The ids of a vocab.txt: the line numbers, from 0. Raises TokenizerError."""
    try:
        lines = content.decode().removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"--vocab-file {path}: not UTF-8 text ({error.reason})") from None
    vocabulary = {line.removesuffix("\r"): number for number, line in enumerate(lines)}
    missing = [token for token in BERT_SPECIAL if token not in vocabulary]
    if missing:
        raise TokenizerError(
            f"--vocab-file {path}: no BERT vocabulary with one token on each line: it lacks "
            f"{' '.join(missing)}"
        )
    return vocabulary


class HuggingFaceTokenizer(LibraryTokenizer):
    """A tokenizer.json, or a folder with one. Nothing is downloaded.

    The eos_token in tokenizer_config.json beside it ends documents; without that file, the first of
    USUAL_ENDS that is in the vocabulary. Added tokens that are not special are always found in
    texts, as the file asks for. Raises TokenizerError if the library or the file is missing, or the
    file is not a tokenizer.
    """

    def __init__(self, path: str | Path):
        library = self.library()
        self._path = Path(path)
        if self._path.is_dir():
            self._path /= TOKENIZER_JSON
        content = base.read_file(self._path, "--tokenizer-model")
        try:
            tokenizer = library.Tokenizer.from_str(content.decode())
        except Exception as error:  # the library has no error type of its own
            given = f"--tokenizer-model {self._path}"
            raise TokenizerError(f"{given}: no tokenizer.json: {error}") from None
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        super().__init__(tokenizer, content)
        added = tokenizer.get_added_tokens_decoder().values()
        self.reserved_texts = tuple(token.content for token in added if token.special)

    def parse_special_tokens(self) -> None:
        """From now on, take the text of a special token of the file for that token."""
        self._tokenizer.encode_special_tokens = False

    def huggingface_files(self) -> dict[str, bytes]:
        """The tokenizer's files beside tokenizer.json, and settings where there are none."""
        files = {}
        for name in PUBLISHED_FILES:
            path = self._path.with_name(name)
            if path.is_file():
                files[name] = path.read_bytes()
        files[TOKENIZER_JSON] = self._path.read_bytes()
        if TOKENIZER_CONFIG not in files:
            end = self._tokenizer.id_to_token(self.eod) if self.eod_or_none is not None else None
            files[TOKENIZER_CONFIG] = base.tokenizer_config(
                "PreTrainedTokenizerFast", eos_token=end
            )
        return files

    @property
    def starts_word(self) -> np.ndarray | None:
        """bool [v]: whether a token begins a word; None if the model is not WordPiece."""
        model = json.loads(self._tokenizer.to_str())["model"]
        if model.get("type") != "WordPiece":
            return None
        return self._word_starts(model["continuing_subword_prefix"])

    @property
    def eod(self) -> int:
        """Id of the end-of-document token. Raises TokenizerError if there is none."""
        named = self._named_end()
        for token in (named,) if named else USUAL_ENDS:
            if token in self._vocabulary:
                return self._vocabulary[token]
        wanted = named or ", ".join(USUAL_ENDS)
        raise TokenizerError(
            f"{self._path}: no token ends documents: {wanted} is not in the vocabulary. Name one "
            "as eos_token in tokenizer_config.json beside it"
        )

    def _named_end(self) -> str | None:
        """The eos_token in tokenizer_config.json; None if there is none."""
        path = self._path.with_name(TOKENIZER_CONFIG)
        if not path.is_file():
            return None
        try:
            token = json.loads(path.read_bytes()).get("eos_token")
        except (ValueError, AttributeError):
            raise TokenizerError(f"{path}: not a JSON object") from None
        return token.get("content") if isinstance(token, dict) else token
