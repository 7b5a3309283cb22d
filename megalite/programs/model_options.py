"""What programs that use a trained model have in common: the flags that name it, and loading it."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from megalite.data.config import MaskingTokenizerType, TokenizerType
from megalite.data.tokenizers import tokenizer_fields
from megalite.fields import Field

if TYPE_CHECKING:
    from megalite.training.load_model import LoadedModel


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The model to load, its tokenizer, and where it runs."""

    load: str
    """Folder of checkpoints, as --save of pretrain_gpt.py or pretrain_bert.py."""
    ckpt_step: Annotated[int | None, Field(minimum=0)] = None
    """Iteration to load. Unset: the latest."""
    tokenizer_type: TokenizerType | None = None
    """Tokenizer. Unset: the one in the checkpoint's configuration; so for its files."""
    tokenizer_model: str | None = None
    """Its model file (SentencePieceTokenizer, HuggingFaceTokenizer, TikTokenizer)."""
    vocab_file: str | None = None
    """Its vocabulary (GPT2BPETokenizer, BertWordPiece*)."""
    parse_special_tokens: bool = False
    """Take the text of a special token for that token, which is the default if the checkpoint's
    run did."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto takes a GPU when there is one."""

    def problems(self) -> Iterator[str]:
        """What is wrong with these values, each with a fix."""
        if not Path(self.load).is_dir():
            yield f"--load {self.load}: there is no such folder"

    def load_model(self, architecture: str) -> "LoadedModel":
        """The model, which must be of this architecture; says on stderr what was loaded."""
        from megalite.training.load_model import load_model

        fields = tokenizer_fields(self)
        loaded = load_model(self.load, architecture, self.ckpt_step, device=self.device, **fields)
        device = loaded.model.context.device
        print(f"iteration {loaded.iteration} of {self.load}, on {device}", file=sys.stderr)
        return loaded


@dataclass(frozen=True, kw_only=True)
class BertOptions(ModelOptions):
    """The BERT to load, its tokenizer, and where it runs."""

    tokenizer_type: MaskingTokenizerType | None = None
    """Tokenizer. Unset: the one in the checkpoint's configuration; so for its files."""
