"""Sample text from a checkpoint of a GPT.

Example: python tools/generate_text.py --load checkpoints --prompt "My fellow citizens"
--max-new-tokens 100

One process reads a checkpoint of any layout.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from megalite.config.cli import parse_options
from megalite.fields import Field
from megalite.programs.model_options import ModelOptions
from megalite.programs.reporting import failures_reported


@dataclass(frozen=True, kw_only=True)
class Options(ModelOptions):
    """What to sample, from what, and how."""

    merge_file: str | None = None
    """Its merges (GPT2BPETokenizer)."""
    tiktoken_pattern: str | None = None
    """Its pattern and special tokens (TikTokenizer). Unset: the one in the checkpoint's
    configuration, or known from the file."""
    prompt: str = ""
    """Text to continue. Empty: start a new document."""
    max_new_tokens: Annotated[int, Field(minimum=1)] = 100
    """Tokens to add at most; sampling ends early at the end of the document."""
    temperature: Annotated[float, Field(minimum=0)] = 0.8
    """Divides the logits: below 1 safer, above 1 wilder; 0 takes the most likely token always."""
    top_k: Annotated[int, Field(minimum=0)] = 50
    """Draw from this many most likely tokens only. 0 = all."""
    top_p: Annotated[float, Field(above=0, maximum=1)] = 1.0
    """Draw from the fewest tokens that hold this share of the probability."""
    seed: int = 1234
    """Seed of the draws."""

    def problems(self) -> Iterator[str]:
        """What is wrong with these values, each with a fix."""
        yield from super().problems()
        # Bytes of the command line that are not UTF-8 arrive as lone surrogates.
        if not self.prompt.isprintable() and "\udc80" <= max(self.prompt) <= "\udcff":
            yield "--prompt: not UTF-8 text"


def sample(options: Options) -> None:
    """Load the model and print the prompt and its continuation as it is drawn."""
    import torch

    from megalite.models.generate import generate

    loaded = options.load_model("gpt")
    tokenizer = loaded.tokenizer
    ids = tokenizer.encode_batch([options.prompt]).ids.tolist() or [tokenizer.eod]
    shown = tokenizer.decode(ids) if options.prompt else ""
    print(shown, end="", flush=True)
    drawn = generate(
        loaded.model,
        torch.tensor([ids], device=loaded.model.context.device),
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
    options = parse_options(Options, __doc__, check=Options.problems)
    with failures_reported():
        sample(options)
