"""SentencePiece models, by the sentencepiece library."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from megalite.data.tokenizers import base
from megalite.data.tokenizers.base import Encoded, TokenizerError


class SentencePieceTokenizer(base.Tokenizer):
    """A SentencePiece model; its end-of-sentence piece ends documents.

    The text of a control piece is ordinary text; that of a user-defined piece is always the piece.
    Raises TokenizerError if the library or the file is missing, or the file is not a model.
    """

    def __init__(self, path: str | Path):
        sentencepiece = base.import_library("sentencepiece", "SentencePieceTokenizer")
        self._data = base.read_file(path, "--tokenizer-model")
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=self._data)
        except RuntimeError:
            raise TokenizerError(f"--tokenizer-model {path}: not a SentencePiece model") from None
        self._path = path
        self.vocab_size = self._processor.get_piece_size()
        self.sha256 = hashlib.sha256(self._data).hexdigest()
        # No text becomes a byte (<0x..), an unknown or a control piece.
        pieces = {"<0x"}
        for i in range(self.vocab_size):
            if self._processor.is_control(i) or self._processor.is_unknown(i):
                pieces.add(self._processor.id_to_piece(i))
        self.reserved_texts = tuple(pieces - {""})

    @property
    def eod(self) -> int:
        """Id of the end-of-sentence piece. Raises TokenizerError if the model has none."""
        eos = self._processor.eos_id()
        if eos < 0:
            raise TokenizerError(
                f"{self._path}: the model has no end-of-sentence piece to end documents with; "
                "train it with an eos_id"
            )
        return eos

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        """Encode texts."""
        return base.pack_ids(self._processor.encode(list(map(str.encode, texts)), num_threads=1))

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of these ids. Control pieces have no text."""
        return self._processor.decode(list(map(int, ids)))

    def huggingface_files(self) -> dict[str, bytes]:
        """The model, and the settings beside it where it was published with some: transformers
        would normalize text in another way than most models."""
        files = {"tokenizer.model": self._data}
        for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
            path = Path(self._path).with_name(name)
            if path.is_file():
                files[name] = path.read_bytes()
        return files

    def load_fast(self, gigatoken):
        """Load the model into gigatoken, which takes BPE with byte fallback."""
        return gigatoken.Tokenizer.from_sentencepiece(self._data)
