"""How BERT samples are made of sentences. Imports no torch."""

from dataclasses import dataclass
from typing import Annotated, Literal

from megalite.fields import Field


@dataclass(frozen=True)
class BertDataConfig:
    """How BERT samples are cut, paired and masked."""

    mask_prob: Annotated[float, Field(above=0, maximum=1)] = 0.15
    """Share of a sample's tokens that the model has to predict, above 0 and at most 1; at least one
    token is."""
    short_seq_prob: Annotated[float, Field(minimum=0, maximum=1)] = 0.1
    """Probability that a sample is made shorter, to a number of tokens uniform in 2 .. what fits,
    from 0 to 1."""
    bert_pair: Literal["nsp", "sop", "none"] = "sop"
    """Task of the pair head. nsp: is the second segment from a random document (next-sentence
    prediction)? sop: are two consecutive segments swapped (sentence-order prediction)? none: one
    segment, no pair head."""
    whole_word_mask: bool = False
    """Mask all tokens of a word or none."""
    max_ngrams: Annotated[int, Field(minimum=1)] = 1
    """Mask up to this many words in a row, n of them with probability proportional to 1 / n; 1:
    every one alone."""
