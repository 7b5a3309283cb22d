"""Which tokens a masked language model has to predict, and what it sees in their place (Devlin et al. 2018).

Of the chosen tokens 80% become [MASK], 10% another random token and 10% stay. Whole words (a token that starts a word
and the continuations after it) can be chosen together, and runs of several words: n words with probability proportional
to 1 / n (as in ALBERT, Lan et al. 2019).
"""

from dataclasses import astuple, dataclass

import numpy as np

from megalite.data.bert_config import BertDataConfig
from megalite.data.indexed import DatasetError

MASKED, RANDOM = 0.8, 0.1
"""Probability that a chosen token is replaced by [MASK], and that it is replaced by a random token."""


@dataclass(frozen=True)
class SpecialIds:
    """Ids of the tokens that frame a sample. They are never masked, and never put in at random."""

    cls: int
    sep: int
    mask: int
    pad: int


class Masker:
    """Masks samples: `masker(tokens, numbers)`.

    Args:
        special: ids that are not masked.
        vocab_size: v, random tokens are uniform over 0 .. v - 1 without the special ids.
        starts_word: bool [v], whether an id begins a word; needed for whole words only.
        config: mask_prob, whole_word_mask and max_ngrams.

    Raises DatasetError when a special id is not in the vocabulary or two are equal, when the vocabulary has no other,
    and when whole words are wanted and starts_word is missing or of another size.
    """

    def __init__(
        self,
        special: SpecialIds,
        vocab_size: int,
        starts_word: np.ndarray | None,
        config: BertDataConfig,
    ):
        ids = sorted(astuple(special))
        if (
            len(set(ids)) < len(ids)
            or ids[0] < 0
            or ids[-1] >= vocab_size
            or vocab_size == len(ids)
        ):
            raise DatasetError(
                f"{special} in a vocabulary of {vocab_size}: these ids must differ, be below the size of the "
                "vocabulary, and not be all of it"
            )
        if config.whole_word_mask and (starts_word is None or len(starts_word) != vocab_size):
            known = "none is known" if starts_word is None else f"{len(starts_word)} are known"
            raise DatasetError(
                f"--whole-word-mask needs to know which of the {vocab_size} tokens begin a word, but {known}. "
                "Use a tokenizer that marks words, such as WordPiece"
            )
        self.special, self.vocab_size, self.config = special, vocab_size, config
        self._special_ids = ids
        self._maskable = np.ones(vocab_size, bool)
        self._maskable[ids] = False
        self._starts_word = (
            np.asarray(starts_word, bool) if config.whole_word_mask else np.ones(vocab_size, bool)
        )
        shares = 1 / np.arange(1, config.max_ngrams + 1)
        self._ngram_bounds = np.cumsum(shares / shares.sum())[:-1]

    def __call__(self, tokens: np.ndarray, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What the model sees, int64 [n], and which tokens it has to predict, bool [n].

        tokens: int64 [n], ids in the vocabulary. numbers: uint32 [n, 4], random words.

        With m maskable tokens, at most max(1, round(mask_prob * m)) are chosen, and at least 1 if m > 0. Where every
        whole word is longer than that, one token of a word is.
        """
        maskable = self._maskable[tokens]
        count = int(maskable.sum())
        if count:
            chosen = self._choose(
                tokens, maskable, max(1, round(self.config.mask_prob * count)), numbers
            )
        else:
            chosen = maskable
        return np.where(chosen, self._replacements(tokens, numbers), tokens), chosen

    def _choose(self, tokens, maskable, budget: int, numbers) -> np.ndarray:
        """Which of the maskable tokens to predict, at most `budget` and at least one: bool [n]."""
        begins = maskable & self._starts_word[tokens]
        begins[1:] |= maskable[1:] & ~maskable[:-1]
        begins[0] = maskable[0]
        first = np.flatnonzero(begins)
        order = np.argsort(numbers[first, 0], kind="stable")
        chosen = np.zeros(len(tokens), bool)
        if not self.config.whole_word_mask and self.config.max_ngrams == 1:
            chosen[first[order[:budget]]] = True
            return chosen
        word = np.cumsum(begins) - 1
        lengths = np.bincount(word[maskable])
        sizes = 1 + np.searchsorted(self._ngram_bounds, numbers[first, 3] / 2**32, side="right")
        taken = _take_words(
            first.tolist(), (first + lengths).tolist(), order.tolist(), sizes.tolist(), budget
        )
        if any(taken):
            return maskable & np.array(taken)[word]
        chosen[first[order[0]] + numbers[first[order[0]], 3] % lengths[order[0]]] = True
        return chosen

    def _replacements(self, tokens, numbers) -> np.ndarray:
        """What stands in place of each token if it is chosen, int64 [n]."""
        random = (numbers[:, 2].astype(np.int64) * (self.vocab_size - len(self._special_ids))) >> 32
        for special in self._special_ids:
            random += random >= special
        kind = numbers[:, 1] / 2**32
        return np.where(
            kind < MASKED, self.special.mask, np.where(kind < MASKED + RANDOM, random, tokens)
        )


def _take_words(
    first: list[int], stop: list[int], order: list[int], sizes: list[int], budget: int
) -> list[bool]:
    """Which words to take, word w being tokens [first[w], stop[w]), with at most `budget` tokens.

    In the given order, each word begins a run of sizes[w] words, if it fits itself. A run ends early before a word
    already taken, a special token, and what is too long for the rest of the budget.
    """
    taken = [False] * len(first)
    for start in order:
        end = first[start]
        for w in range(start, min(start + sizes[start], len(first))):
            if taken[w] or first[w] != end or stop[w] - end > budget:
                break
            taken[w], end = True, stop[w]
            budget -= end - first[w]
        if budget == 0:
            break
    return taken
