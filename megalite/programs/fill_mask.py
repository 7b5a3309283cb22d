"""Fill the [MASK] tokens of texts by a pretrained BERT.

Example: python tools/fill_mask.py --load checkpoints --text 'the people of the united [MASK] .'

One process reads a checkpoint of any layout.
"""

from collections.abc import Iterator
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Annotated

from megalite.config.cli import parse_options
from megalite.data.indexed import DatasetError
from megalite.data.masking import SpecialIds, special_ids
from megalite.fields import Field
from megalite.programs.model_options import BertOptions
from megalite.programs.reporting import failures_reported

if TYPE_CHECKING:
    import torch

    from megalite.training.load_model import LoadedModel

MASK = "[MASK]"


@dataclass(frozen=True, kw_only=True)
class Options(BertOptions):
    """Which blanks to fill, and by what."""

    text: tuple[str, ...]
    """Texts with one [MASK] or more in each, whatever the tokenizer calls it."""
    top: Annotated[int, Field(minimum=1)] = 5
    """Tokens to show for each blank, the most probable first."""

    def problems(self) -> Iterator[str]:
        """What is wrong with these values, each with a fix."""
        yield from super().problems()
        for text in self.text:
            if MASK not in text:
                yield f"--text {text!r}: has no {MASK}"


def fill(options: Options) -> None:
    """Load the model, and print each text and the most probable tokens of each of its blanks."""
    loaded = options.load_model("bert")
    special = special_ids(loaded.tokenizer)
    # All texts are encoded first: one that is too long ends the program before any output.
    rows = [encode(text, loaded, special) for text in options.text]
    for text, row in zip(options.text, rows, strict=True):
        print(text)
        for choices in most_probable(row, loaded, special, options.top):
            print("  " + ", ".join(f"{token} {share:.1%}" for token, share in choices))


def encode(text: str, loaded: "LoadedModel", special: SpecialIds) -> "torch.Tensor":
    """Token ids [1, s] of a text with blanks, framed by [CLS] and [SEP].

    Raises DatasetError when the model has fewer positions.
    """
    import torch

    # A space before a blank belongs to the word that is masked: byte-level tokens would keep it.
    between = text.replace(f" {MASK}", MASK).split(MASK)
    row = [special.cls]
    for number, ids in enumerate(loaded.tokenizer.encode_batch(between).split()):
        if number > 0:
            row.append(special.mask)
        row += ids.tolist()
    row.append(special.sep)
    positions = loaded.model.model_config.positions
    if len(row) > positions:
        size = f"{len(row)} tokens, the model has {positions} positions"
        raise DatasetError(f"--text {text[:40]}...: {size}")
    return torch.tensor([row], device=loaded.model.context.device)


def most_probable(
    row: "torch.Tensor", loaded: "LoadedModel", special: SpecialIds, top: int
) -> list[list[tuple[str, float]]]:
    """For each [MASK] of a row [1, s] the `top` most probable tokens with their probabilities."""
    import torch

    from megalite.models.batch import Microbatch

    tokenizer = loaded.tokenizer
    with torch.no_grad():
        logits = loaded.model(None, Microbatch(row))[:, 0, : tokenizer.vocab_size]
    logits[:, list(astuple(special))] = float("-inf")  # [CLS], [SEP], [MASK] are no words
    found = []
    for position in (row[0] == special.mask).nonzero().flatten():
        probabilities = logits[position].double().softmax(dim=-1)
        shares, ids = probabilities.topk(min(top, tokenizer.vocab_size))
        tokens = [tokenizer.decode([i]) for i in ids.tolist()]
        found.append(list(zip(tokens, shares.tolist())))
    return found


def main() -> None:
    """Read the flags, report all problems at once (status 2), fill in."""
    options = parse_options(Options, __doc__, check=Options.problems)
    with failures_reported():
        fill(options)
