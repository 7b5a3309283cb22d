#!/usr/bin/env python
"""Sample text from a checkpoint, in one process, whatever the layout that wrote it.

Example: python tools/generate_text.py --load checkpoints --prompt "My fellow citizens" --max-new-tokens 100
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's megalite, installed or not


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
    tokenizer_type: Literal["SentencePieceTokenizer", "ByteTokenizer"] | None = None
    """Tokenizer, where the checkpoint's configuration names none."""
    tokenizer_model: str | None = None
    """Its model file. Unset: the one named in the checkpoint's configuration."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto takes a GPU when there is one."""

    def problems(self) -> list[str]:
        """Everything wrong with these values, each with what would work."""
        checks = [
            (self.max_new_tokens < 1, f"--max-new-tokens {self.max_new_tokens}: use 1 or more"),
            (self.temperature < 0, f"--temperature {self.temperature}: use 0 (most likely token) or more"),
            (self.top_k < 0, f"--top-k {self.top_k}: use 0 (all) or more"),
            (not 0 < self.top_p <= 1, f"--top-p {self.top_p}: use a share above 0 and up to 1"),
            (not self.prompt.isprintable() and "\udc80" <= max(self.prompt) <= "\udcff", "--prompt: not UTF-8 text"),
            (not Path(self.load).is_dir(), f"--load {self.load}: there is no such folder"),
        ]
        return [text for wrong, text in checks if wrong]


def sample(options: Options) -> None:
    """Load the model and print the prompt and its continuation as it is drawn."""
    import torch
    import yaml

    from megalite.checkpoint.folder import CheckpointError
    from megalite.checkpoint.load import Checkpoint
    from megalite.config import from_flat
    from megalite.data.tokenizers import TokenizerError, build_tokenizer
    from megalite.models.generate import generate
    from megalite.models.gpt import GPT
    from megalite.parallel.context import ParallelContext, choose_device
    from megalite.parallel.launch import LaunchInfo
    from megalite.parallel.rng import CountedRng
    from megalite.training.state import load_weights

    with Checkpoint.open(options.load, options.ckpt_step) as checkpoint:
        config = from_flat(yaml.safe_load(checkpoint.config_yaml))
        if config.is_bert:
            raise CheckpointError(f"{options.load} holds a BERT, which does not generate text; give a GPT's checkpoint")
        kind = options.tokenizer_type or config.data.tokenizer_type
        if kind is None:
            raise SystemExit("the checkpoint's configuration names no tokenizer: give --tokenizer-type (and its model)")
        # The configured model file belongs to the configured kind of tokenizer.
        configured = config.data.tokenizer_model if kind == config.data.tokenizer_type else None
        tokenizer = build_tokenizer(kind, options.tokenizer_model or configured)
        if tokenizer.vocab_size > config.model.vocab_size:
            raise TokenizerError(
                f"the tokenizer has {tokenizer.vocab_size} entries, the model in {options.load} only "
                f"{config.model.vocab_size}: give the one it was trained with, with --tokenizer-model"
            )
        device, _ = choose_device(options.device, LaunchInfo(0, 1, 0, 1, "", "none"))
        context = ParallelContext.single(device)
        dtype = getattr(torch, config.optimizer.dtype)
        model = GPT(config.model, context, CountedRng.for_seed(0), range(config.model.num_layers), dtype)
        load_weights(checkpoint, model.parameters_by_name)
        print(f"iteration {checkpoint.iteration} of {options.load}, on {device}", file=sys.stderr)
    ids = tokenizer.encode_batch([options.prompt]).ids.tolist() or [tokenizer.eod]
    prompt = torch.tensor([ids], device=device)
    shown = tokenizer.decode(ids) if options.prompt else ""
    print(shown, end="", flush=True)
    made = []
    for token in generate(
        model, prompt, options.max_new_tokens, options.temperature, options.top_k, options.top_p, options.seed
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


if __name__ == "__main__":
    main()
