"""Fill the [MASK] tokens of texts by a pretrained BERT.

Example: python tools/fill_mask.py --load checkpoints --text 'the people of the united [MASK] .'

One process reads a checkpoint of any layout.
"""

import sys
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from megalite.config.cli import parse_options
from megalite.programs.reporting import failures_reported, refuse

if TYPE_CHECKING:
    import torch

    from megalite.data.masking import SpecialIds
    from megalite.training.trained import LoadedModel

MASK = "[MASK]"


@dataclass(frozen=True)
class Options:
    """Which blanks to fill, and by what."""

    load: str
    """Folder of checkpoints, as --save of pretrain_bert.py."""
    text: tuple[str, ...]
    """Texts with one [MASK] or more in each, whatever the tokenizer calls it."""
    top: int = 5
    """Tokens to show for each blank, the most probable first."""
    ckpt_step: int | None = None
    """Iteration to load. Unset: the latest."""
    tokenizer_type: (
        Literal["BertWordPieceLowerCase", "BertWordPieceCase", "HuggingFaceTokenizer"] | None
    ) = None
    """Tokenizer. Unset: the one in the checkpoint's configuration."""
    vocab_file: str | None = None
    """Its vocab.txt (BertWordPiece*). Unset: the one in the checkpoint's configuration."""
    tokenizer_model: str | None = None
    """Its tokenizer.json (HuggingFaceTokenizer). Unset: the one in the checkpoint's
    configuration."""
    parse_special_tokens: bool = False
    """Take the text of a special token for that token, which is the default if the checkpoint's
    run did."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto takes a GPU when there is one."""

    def problems(self) -> list[str]:
        """Everything wrong with these values, each with a fix."""
        checks = [
            (self.top < 1, f"--top {self.top}: use 1 or more"),
            (not Path(self.load).is_dir(), f"--load {self.load}: there is no such folder"),
            (not self.text, f"--text: give at least one text with {MASK}"),
        ]
        for text in self.text:
            checks.append((MASK not in text, f"--text {text!r}: has no {MASK}"))
        return [text for wrong, text in checks if wrong]


def fill(options: Options) -> None:
    """Load the model, and print each text and the most probable tokens of each of its blanks."""
    from megalite.data.masking import special_ids
    from megalite.data.tokenizers import tokenizer_fields
    from megalite.training.trained import load_model

    loaded = load_model(
        options.load,
        "bert",
        step=options.ckpt_step,
        device=options.device,
        **tokenizer_fields(options),
    )
    special = special_ids(loaded.tokenizer)
    device = loaded.model.context.device
    print(f"iteration {loaded.iteration} of {options.load}, on {device}", file=sys.stderr)
    # All texts are encoded first: one that is too long ends the program before any output.
    rows = [encode(text, loaded, special) for text in options.text]
    for text, row in zip(options.text, rows, strict=True):
        print(text)
        for choices in most_probable(row, loaded, special, options.top):
            print("  " + ", ".join(f"{token} {share:.1%}" for token, share in choices))


def encode(text: str, loaded: "LoadedModel", special: "SpecialIds") -> "torch.Tensor":
    """Token ids [1, s] of a text with blanks, framed by [CLS] and [SEP].

    Raises DatasetError when the model has fewer positions.
    """
    import torch

    from megalite.data.indexed import DatasetError

    # A space before a blank belongs to the word that is masked: byte-level tokens would keep it.
    between = text.replace(f" {MASK}", MASK).split(MASK)
    row = [special.cls]
    for number, ids in enumerate(loaded.tokenizer.encode_batch(between).split()):
        if number > 0:
            row.append(special.mask)
        row += ids.tolist()
    row.append(special.sep)
    positions = loaded.model.config.positions
    if len(row) > positions:
        raise DatasetError(
            f"--text {text[:40]}...: {len(row)} tokens, the model has {positions} positions"
        )
    return torch.tensor([row], device=loaded.model.context.device)


def most_probable(
    row: "torch.Tensor", loaded: "LoadedModel", special: "SpecialIds", top: int
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
    options = parse_options(Options, __doc__)
    refuse(options.problems())

    from megalite.checkpoint.folder import CheckpointError
    from megalite.data.indexed import DatasetError
    from megalite.data.tokenizers import TokenizerError
    from megalite.parallel.context import DeviceError

    with failures_reported(CheckpointError, DatasetError, TokenizerError, DeviceError):
        fill(options)
