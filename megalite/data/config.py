"""Where the tokens come from and how they are grouped. Imports no torch."""

from dataclasses import dataclass
from typing import Annotated, Literal

from megalite.fields import Field

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
"""Fields that name the files of each kind of tokenizer. It needs all of these, and no others."""
TokenizerType = Literal[tuple(TOKENIZER_FILES)]
"""The kinds of tokenizer, by Megatron's names."""
MaskingTokenizerType = Literal[
    "BertWordPieceLowerCase", "BertWordPieceCase", "HuggingFaceTokenizer"
]
"""Those that may have the tokens that frame and mask a BERT's samples."""
NO_SPECIAL_TEXTS: dict[str, str] = {
    "SentencePieceTokenizer": "SentencePiece never reads a control piece from a text. Train the "
    "model with user_defined_symbols, which it always reads",
    "NullTokenizer": "the text of a NullTokenizer is ids already, those of special tokens too",
    "ByteTokenizer": "a ByteTokenizer has no special token that a text could contain",
}
"""Kinds that --parse-special-tokens cannot be used with: the reason."""
TOKENIZER_FIELDS = ("tokenizer_type", "tokenizer_model", "vocab_file", "merge_file")
TOKENIZER_FIELDS += ("tiktoken_pattern", "parse_special_tokens")
"""Fields that determine the ids of a text."""


@dataclass(frozen=True)
class DataConfig:
    """Where the tokens come from and how they are grouped into batches."""

    data_path: tuple[str, ...] | None = None
    """Prefix of an indexed dataset, PREFIX.bin and PREFIX.idx, as tools/preprocess_data.py writes
    it; or several with weights, 0.3 PREFIX 0.7 PREFIX, to blend. --split divides each."""
    train_data_path: tuple[str, ...] | None = None
    """Prefixes and weights, as --data-path takes them, for training alone: all of their documents,
    in place of --data-path."""
    valid_data_path: tuple[str, ...] | None = None
    """Prefixes and weights, as --data-path takes them, for validation alone."""
    sample_order: Literal["counted", "megatron"] = "counted"
    """counted: windows over all tokens, shuffled by counter-based random numbers, so that the order
    depends on the seed alone. megatron: the samples and the order of Megatron-core's GPTDataset,
    which depend on the number of iterations too."""
    mock_data: bool = False
    """Generate tokens with structure that can be learned, in place of --data-path. Needs
    --vocab-size."""
    split: str = "969,30,1"
    """Shares of the documents for training, validation and test; missing ones are 0."""
    tokenizer_type: TokenizerType | None = None
    """Tokenizer that the data was made with; gives the vocabulary size and is recorded for
    sampling."""
    tokenizer_model: str | None = None
    """Model file of the tokenizer: a SentencePiece .model, a tokenizer.json or its folder
    (HuggingFaceTokenizer), a file of BPE ranks (TikTokenizer)."""
    vocab_file: str | None = None
    """Vocabulary of the tokenizer: encoder.json (GPT2BPETokenizer) or vocab.txt (BertWordPiece*).
    """
    merge_file: str | None = None
    """Merges of the tokenizer: vocab.bpe (GPT2BPETokenizer)."""
    tiktoken_pattern: str | None = None
    """How a TikTokenizer splits text, and its special tokens: r50k_base, cl100k_base, o200k_base,
    llama3, llama4, qwen, qwen3.5, or v1 or v2 of Megatron-LM. Unset: known from the file."""
    parse_special_tokens: bool = False
    """Take the text of a special token for that token, as when the data was made; recorded for
    sampling."""
    micro_batch_size: Annotated[int, Field(minimum=1)] = 1
    """Sequences in one forward pass of one data-parallel rank, b."""
    global_batch_size: Annotated[int | None, Field(minimum=1)] = None
    """Sequences in one optimizer step over all ranks. Unset: --micro-batch-size * data-parallel
    size."""
    rampup_batch_size: Annotated[tuple[str, ...] | None, Field(example=("16", "16", "100000"))] = (
        None
    )
    """START INCREMENT SAMPLES: the first global batches have START sequences, and over the first
    SAMPLES sequences they grow by INCREMENT at a time to --global-batch-size."""
    eod_mask_loss: Annotated[bool, Field(needs_eod=True)] = False
    """Leave positions whose input is the end-of-document token out of the loss (needs a tokenizer).
    """
    reset_position_ids: Annotated[bool, Field(needs_eod=True)] = False
    """Count positions from 0 after each end-of-document token in a sequence (needs a tokenizer)."""
    reset_attention_mask: Annotated[bool, Field(needs_eod=True)] = False
    """Attend only within a document; the end-of-document token belongs to the one it ends (needs a
    tokenizer)."""

    @property
    def eod_options(self) -> dict[str, bool]:
        """The options that need the token that ends a document, by field."""
        fields = ("eod_mask_loss", "reset_position_ids", "reset_attention_mask")
        return {field: getattr(self, field) for field in fields}

    @property
    def paths(self) -> dict[str, tuple[str, ...] | None]:
        """The values of the fields that name datasets, by field."""
        fields = ("data_path", "train_data_path", "valid_data_path")
        return {field: getattr(self, field) for field in fields}

    def words_of(self, split: str) -> tuple[str, tuple[str, ...] | None]:
        """(flag, its value) that says what "train", "valid" or "test" samples are made of."""
        own = {"train": self.train_data_path, "valid": self.valid_data_path}.get(split)
        return (f"--{split}-data-path", own) if own else ("--data-path", self.data_path)
