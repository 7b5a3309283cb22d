"""SentencePiece models, by the sentencepiece library."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from megalite.data.tokenizers.base import (
    Encoded,
    ReferenceTokenizer,
    TokenizerError,
    encoded,
    library,
    read,
)


class SentencePieceTokenizer(ReferenceTokenizer):
    """A SentencePiece model; its end-of-sentence piece ends documents.

    The text of a control piece is ordinary text; that of a piece which the model was trained to keep whole is not.
    Raises TokenizerError when the library or the file is missing, or the file is no model.
    """

    def __init__(self, path: str | Path):
        sentencepiece = library("sentencepiece", "SentencePieceTokenizer")
        self._data = read(path, "--tokenizer-model")
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=self._data)
        except RuntimeError:
            raise TokenizerError(f"--tokenizer-model {path}: not a SentencePiece model") from None
        self._path = path
        self.vocab_size = self._processor.get_piece_size()
        self.sha256 = hashlib.sha256(self._data).hexdigest()
        self.marks = self._reserved()

    def _reserved(self) -> tuple[str, ...]:
        """How pieces that text never becomes are written: unknown, control and byte pieces (<0x..)."""
        p = self._processor
        ids = [i for i in range(self.vocab_size) if p.is_control(i) or p.is_unknown(i)]
        return ("<0x", *filter(None, map(p.id_to_piece, ids)))

    @property
    def eod(self) -> int:
        """Id of the end-of-sentence piece. Raises TokenizerError when the model was trained without one."""
        eos = self._processor.eos_id()
        if eos < 0:
            raise TokenizerError(
                f"{self._path}: the model has no end-of-sentence piece to end documents with; train it with an eos_id"
            )
        return eos

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        """Ids of each text."""
        return encoded(self._processor.encode([text.encode() for text in texts], num_threads=1))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these ids; control pieces give none."""
        return self._processor.decode([int(i) for i in ids])

    def load_fast(self, gigatoken):
        """BPE models that spell in bytes what they lack."""
        return gigatoken.Tokenizer.from_sentencepiece(self._data)
