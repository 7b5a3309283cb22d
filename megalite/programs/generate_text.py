"""Sample text from a checkpoint, in one process, whatever the layout that wrote it.

Example: python tools/generate_text.py --load checkpoints --prompt "My fellow citizens" --max-new-tokens 100
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from megalite.data.config import TokenizerType


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
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto takes a GPU when there is one."""

    def problems(self) -> list[str]:
        """Everything wrong with these values, each with what would work."""
        checks = [
            (self.max_new_tokens < 1, f"--max-new-tokens {self.max_new_tokens}: use 1 or more"),
            (
                self.temperature < 0,
                f"--temperature {self.temperature}: use 0 (most likely token) or more",
            ),
            (self.top_k < 0, f"--top-k {self.top_k}: use 0 (all) or more"),
            (not 0 < self.top_p <= 1, f"--top-p {self.top_p}: use a share above 0 and up to 1"),
            (
                not self.prompt.isprintable() and "\udc80" <= max(self.prompt) <= "\udcff",
                "--prompt: not UTF-8 text",
            ),
            (not Path(self.load).is_dir(), f"--load {self.load}: there is no such folder"),
        ]
        return [text for wrong, text in checks if wrong]


def sample(options: Options) -> None:
    """Load the model and print the prompt and its continuation as it is drawn."""
    import torch

    from megalite.models.generate import generate
    from megalite.training.trained import load_model

    trained = load_model(
        options.load,
        "gpt",
        options.ckpt_step,
        options.device,
        tokenizer_type=options.tokenizer_type,
        tokenizer_model=options.tokenizer_model,
        vocab_file=options.vocab_file,
        merge_file=options.merge_file,
    )
    model, tokenizer = trained.model, trained.tokenizer
    print(
        f"iteration {trained.iteration} of {options.load}, on {model.context.device}",
        file=sys.stderr,
    )
    ids = tokenizer.encode_batch([options.prompt]).ids.tolist() or [tokenizer.eod]
    prompt = torch.tensor([ids], device=model.context.device)
    shown = tokenizer.decode(ids) if options.prompt else ""
    print(shown, end="", flush=True)
    made = []
    for token in generate(
        model,
        prompt,
        options.max_new_tokens,
        options.temperature,
        options.top_k,
        options.top_p,
        options.seed,
    ):
        if token.item() == tokenizer.eod:
            break
        made.append(token.item())
        # Decoding all again is what gives the right spaces, and whole characters from their bytes.
        text = tokenizer.decode(ids + made) if options.prompt else tokenizer.decode(made)
        if not text.endswith("\ufffd"):
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print()


def main() -> None:
    """Read the flags, report all problems at once (status 2), sample."""
    options = tyro.cli(Options, description=__doc__)
    if problems := options.problems():
        print("\n".join(f"generate_text.py: {problem}" for problem in problems), file=sys.stderr)
        raise SystemExit(2)
    from megalite.checkpoint.folder import CheckpointError
    from megalite.data.tokenizers import TokenizerError
    from megalite.parallel.context import DeviceError

    try:
        sample(options)
    except (CheckpointError, TokenizerError, DeviceError, OSError) as error:
        print(f"generate_text.py: {error}", file=sys.stderr)
        raise SystemExit(1) from None
