"""Where the tokens come from and how they are grouped. Imports no torch."""

from dataclasses import dataclass
from typing import Literal

TokenizerType = Literal[
    "SentencePieceTokenizer",
    "GPT2BPETokenizer",
    "BertWordPieceLowerCase",
    "BertWordPieceCase",
    "HuggingFaceTokenizer",
    "TikTokenizer",
    "NullTokenizer",
    "ByteTokenizer",
]
"""The kinds of tokenizer, by Megatron's names."""
TOKENIZER_FILES: dict[str, tuple[str, ...]] = {
    "SentencePieceTokenizer": ("tokenizer_model",),
    "GPT2BPETokenizer": ("vocab_file", "merge_file"),
    "BertWordPieceLowerCase": ("vocab_file",),
    "BertWordPieceCase": ("vocab_file",),
    "HuggingFaceTokenizer": ("tokenizer_model",),
    "TikTokenizer": ("tokenizer_model",),
    "NullTokenizer": (),
    "ByteTokenizer": (),
}
"""The files that each kind is made of, by the fields that name them: it needs all of these, and no others."""


@dataclass(frozen=True)
class DataConfig:
    """Where the tokens come from and how they are grouped into batches."""

    data_path: str | None = None
    """Prefix of an indexed dataset, PREFIX.bin and PREFIX.idx, as tools/preprocess_data.py writes it."""
    mock_data: bool = False
    """Tokens made up on the spot, with structure that can be learned, in place of --data-path. Needs --vocab-size."""
    split: str = "969,30,1"
    """Shares of the documents for training, validation and test; missing ones are 0."""
    tokenizer_type: TokenizerType | None = None
    """Tokenizer that the data was made with; gives the vocabulary size and is recorded for sampling."""
    tokenizer_model: str | None = None
    """Model file of the tokenizer: a SentencePiece .model, a tokenizer.json or its folder (HuggingFaceTokenizer), a
    .tiktoken file of ranks (TikTokenizer)."""
    vocab_file: str | None = None
    """Vocabulary of the tokenizer: encoder.json (GPT2BPETokenizer) or vocab.txt (BertWordPiece*)."""
    merge_file: str | None = None
    """Merges of the tokenizer: vocab.bpe (GPT2BPETokenizer)."""
    micro_batch_size: int = 1
    """Sequences in one forward pass of one data-parallel rank, b."""
    global_batch_size: int | None = None
    """Sequences in one optimizer step over all ranks. Unset: --micro-batch-size * data-parallel size."""
    eod_mask_loss: bool = False
    """Leave positions whose input is the end-of-document token out of the loss (needs a tokenizer)."""
