"""What a stage of a model is given of one microbatch."""

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Microbatch:
    """Tensors of one microbatch, whole rows of whole sequences. Each stage is given what its
    `inputs` name; the rest is None."""

    tokens: Tensor | None = None
    """[b, s] token ids."""
    labels: Tensor | None = None
    """[b, s] token ids that the model should predict."""
    loss_mask: Tensor | None = None
    """[b, s] of 0 and 1: which labels count."""
    samples: Tensor | None = None
    """[b] numbers of the sequences in the whole run, on every stage; dropout depends on them."""
    positions: Tensor | None = None
    """[b, s] int64, position of each token in its document, below s. None: in its row, 0 to s -
    1."""
    segments: Tensor | None = None
    """[b, s] int64: a token attends only to tokens of its row with the same number. GPT: the index
    of the token's document in its row; None: a row is one document. BERT: 1, and 0 for padding (the
    segments of a pair are `token_types`)."""
    token_types: Tensor | None = None
    """[b, s] int64, 0 for the first segment of a pair, 1 for the second."""
    pair_label: Tensor | None = None
    """[b] int64, 1 for a pair that is no pair (nsp), or is swapped (sop)."""
    pair_mask: Tensor | None = None
    """[b] of 0 and 1: which rows hold a pair."""
