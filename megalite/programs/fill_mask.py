"""What a pretrained BERT puts in the place of [MASK], in one process, whatever the layout that wrote the checkpoint.

Example: python tools/fill_mask.py --load checkpoints --text 'the people of the united [MASK] .'
"""

import sys
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Literal

import tyro

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
    """Its tokenizer.json (HuggingFaceTokenizer). Unset: the one in the checkpoint's configuration."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto takes a GPU when there is one."""

    def problems(self) -> list[str]:
        """Everything wrong with these values, each with what would work."""
        checks = [
            (self.top < 1, f"--top {self.top}: use 1 or more"),
            (not Path(self.load).is_dir(), f"--load {self.load}: there is no such folder"),
            (not self.text, f"--text: give at least one text with {MASK}"),
            *((MASK not in text, f"--text {text!r}: has no {MASK}") for text in self.text),
        ]
        return [text for wrong, text in checks if wrong]


def fill(options: Options) -> None:
    """Load the model, and print each text and the most probable tokens of each of its blanks."""
    import torch

    from megalite.data.indexed import DatasetError
    from megalite.data.masking import special_ids
    from megalite.models.batch import Microbatch
    from megalite.training.trained import load_model

    trained = load_model(
        options.load,
        "bert",
        options.ckpt_step,
        options.device,
        tokenizer_type=options.tokenizer_type,
        vocab_file=options.vocab_file,
        tokenizer_model=options.tokenizer_model,
    )
    model, tokenizer, special = trained.model, trained.tokenizer, special_ids(trained.tokenizer)
    print(
        f"iteration {trained.iteration} of {options.load}, on {model.context.device}",
        file=sys.stderr,
    )
    rows = []
    for text in options.text:
        row = [special.cls]
        # A space before a blank belongs to the word that is masked: byte-level tokens would keep it.
        parts = text.replace(f" {MASK}", MASK).split(MASK)
        for number, part in enumerate(tokenizer.encode_batch(parts).split()):
            row += [special.mask] * (number > 0) + part.tolist()
        rows.append(torch.tensor([[*row, special.sep]], device=model.context.device))
        if (length := rows[-1].shape[1]) > model.config.positions:
            raise DatasetError(
                f"--text {text[:40]}...: {length} tokens, the model has {model.config.positions} positions"
            )
    for text, tokens in zip(options.text, rows, strict=True):
        print(text)
        with torch.no_grad():
            logits = model(None, Microbatch(tokens))[:, 0, : tokenizer.vocab_size]
        logits[:, list(astuple(special))] = float("-inf")  # no words
        for place in (tokens[0] == special.mask).nonzero().flatten():
            shares, ids = (
                logits[place].double().softmax(dim=-1).topk(min(options.top, tokenizer.vocab_size))
            )
            words = (
                f"{tokenizer.decode([i])} {share:.1%}"
                for i, share in zip(ids.tolist(), shares.tolist())
            )
            print("  " + ", ".join(words))


def main() -> None:
    """Read the flags, report all problems at once (status 2), fill in."""
    options = tyro.cli(Options, description=__doc__)
    if problems := options.problems():
        print("\n".join(f"fill_mask.py: {problem}" for problem in problems), file=sys.stderr)
        raise SystemExit(2)
    from megalite.checkpoint.folder import CheckpointError
    from megalite.data.indexed import DatasetError
    from megalite.data.tokenizers import TokenizerError
    from megalite.parallel.context import DeviceError

    try:
        fill(options)
    except (CheckpointError, DatasetError, TokenizerError, DeviceError, OSError) as error:
        print(f"fill_mask.py: {error}", file=sys.stderr)
        raise SystemExit(1) from None
