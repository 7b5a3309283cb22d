"""Sample text from a checkpoint of a GPT.

Example: python tools/generate_text.py --load checkpoints --prompt "My fellow citizens"
--max-new-tokens 100

One process reads a checkpoint of any layout.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megalite.config.cli import parse_options
from megalite.data.config import TokenizerType
from megalite.programs.reporting import failures_reported, refuse


@dataclass(frozen=True)
class Options:
    """What to sample, from what, and how."""

    load: str
    """Folder of checkpoints, as --save of pretrain_gpt.py."""
    prompt: str = ""
    """Text to continue. Empty: start a new document."""
    max_new_tokens: int = 100
    """Tokens to add at most; sampling ends early at the end of the document."""
    temperature: float = 0.8
    """Divides the logits: below 1 safer, above 1 wilder; 0 takes the most likely token always."""
    top_k: int = 50
    """Draw from this many most likely tokens only. 0 = all."""
    top_p: float = 1.0
    """Draw from the fewest tokens that hold this share of the probability."""
    seed: int = 1234
    """Seed of the draws."""
    ckpt_step: int | None = None
    """Iteration to load. Unset: the latest."""
    tokenizer_type: TokenizerType | None = None
    """Tokenizer. Unset: the one in the checkpoint's configuration."""
    tokenizer_model: str | None = None
    """Its model file. Unset: the one in the checkpoint's configuration; so for the next two."""
    vocab_file: str | None = None
    """Its vocabulary (GPT2BPETokenizer, BertWordPiece*)."""
    merge_file: str | None = None
    """Its merges (GPT2BPETokenizer)."""
    tiktoken_pattern: str | None = None
    """Its pattern and special tokens (TikTokenizer). Unset: the one in the checkpoint's
    configuration, or known from the file."""
    parse_special_tokens: bool = False
    """Take the text of a special token for that token, which is the default if the checkpoint's
    run did."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto takes a GPU when there is one."""

    def problems(self) -> list[str]:
        """Everything wrong with these values, each with a fix."""
        # Bytes of the command line that are not UTF-8 arrive as lone surrogates.
        undecodable = not self.prompt.isprintable() and "\udc80" <= max(self.prompt) <= "\udcff"
        checks = [
            (self.max_new_tokens < 1, f"--max-new-tokens {self.max_new_tokens}: use 1 or more"),
            (
                self.temperature < 0,
                f"--temperature {self.temperature}: use 0 (most likely token) or more",
            ),
            (self.top_k < 0, f"--top-k {self.top_k}: use 0 (all) or more"),
            (not 0 < self.top_p <= 1, f"--top-p {self.top_p}: use a share above 0 and up to 1"),
            (undecodable, "--prompt: not UTF-8 text"),
            (not Path(self.load).is_dir(), f"--load {self.load}: there is no such folder"),
        ]
        return [text for wrong, text in checks if wrong]


def sample(options: Options) -> None:
    """Load the model and print the prompt and its continuation as it is drawn."""
    import torch

    from megalite.data.tokenizers import tokenizer_fields
    from megalite.models.generate import generate
    from megalite.training.trained import load_model

    loaded = load_model(
        options.load,
        "gpt",
        step=options.ckpt_step,
        device=options.device,
        **tokenizer_fields(options),
    )
    tokenizer = loaded.tokenizer
    device = loaded.model.context.device
    print(f"iteration {loaded.iteration} of {options.load}, on {device}", file=sys.stderr)
    ids = tokenizer.encode_batch([options.prompt]).ids.tolist() or [tokenizer.eod]
    shown = tokenizer.decode(ids) if options.prompt else ""
    print(shown, end="", flush=True)
    drawn = generate(
        loaded.model,
        torch.tensor([ids], device=device),
        options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
    )
    given = ids if options.prompt else []
    new: list[int] = []
    for token in drawn:
        if token.item() == tokenizer.eod:
            break
        new.append(token.item())
        # All tokens are decoded again, for right spaces and characters of several tokens.
        text = tokenizer.decode(given + new)
        if not text.endswith("\ufffd"):
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print()


def main() -> None:
    """Read the flags, report all problems at once (status 2), sample."""
    options = parse_options(Options, __doc__)
    refuse(options.problems())

    from megalite.checkpoint.folder import CheckpointError
    from megalite.data.tokenizers import TokenizerError
    from megalite.parallel.context import DeviceError

    with failures_reported(CheckpointError, TokenizerError, DeviceError):
        sample(options)
