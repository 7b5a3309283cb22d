"""Masked language modelling: the tokens that a model has to predict, and what it sees instead.

Of the chosen tokens 80% become [MASK], 10% another random token and 10% stay (Devlin et al. 2018).
Optionally whole words are chosen (a token that starts a word and the continuations after it), and
runs of several words: n words with probability proportional to 1 / n (as in ALBERT, Lan et al.
2019).
"""

from dataclasses import astuple, dataclass

import numpy as np

from megalite.data.bert_config import BertDataConfig
from megalite.data.indexed import DatasetError
from megalite.data.tokenizers import Tokenizer, TokenizerError

MASKED = 0.8
"""Probability that a chosen token is replaced by [MASK]."""
RANDOM = 0.1
"""Probability that a chosen token is replaced by a random token."""
FRAMES = (("[CLS]", "[SEP]", "[MASK]", "[PAD]"), ("<s>", "</s>", "<mask>", "<pad>"))
"""Names of the special tokens of a sample: BERT's and RoBERTa's."""


@dataclass(frozen=True)
class SpecialIds:
    """Ids of the tokens that frame a sample. They are never masked, nor used as random tokens."""

    cls: int
    sep: int
    mask: int
    pad: int


def special_ids(tokenizer: Tokenizer) -> SpecialIds:
    """The special ids of a tokenizer. Raises TokenizerError when its vocabulary lacks one."""
    for names in FRAMES if hasattr(tokenizer, "ids_of") else ():
        ids = tokenizer.ids_of(names)
        if None not in ids:
            return SpecialIds(*ids)
    raise TokenizerError(
        f"BERT needs a vocabulary with {' '.join(FRAMES[0])} (or {' '.join(FRAMES[1])}), which "
        "this tokenizer does not have: use --tokenizer-type BertWordPieceLowerCase or "
        "BertWordPieceCase "
        "with a vocab.txt"
    )


def frame(special: SpecialIds, *texts: np.ndarray) -> np.ndarray:
    """[CLS] A [SEP] or [CLS] A [SEP] B [SEP] of the ids of one or two texts: int64 [length]."""
    row = [[special.cls]]
    for text in texts:
        row += [text, [special.sep]]
    return np.concatenate(row).astype(np.int64)


@dataclass(eq=False)
class Masker:
    """Masks samples: `masker(tokens, numbers)`.

    Raises DatasetError when a special id is not in the vocabulary or two are equal, when the
    vocabulary has no other ids, and when whole words are masked and starts_word is missing or has
    another size.
    """

    special: SpecialIds
    """Ids that are not masked."""
    vocab_size: int
    """v; random tokens are uniform over 0 .. v - 1 without the special ids."""
    starts_word: np.ndarray | None
    """bool [v], whether an id starts a word; needed for whole words only."""
    config: BertDataConfig
    """mask_prob, whole_word_mask and max_ngrams."""

    def __post_init__(self):
        vocab_size = self.vocab_size
        ids = sorted(astuple(self.special))
        distinct = len(set(ids)) == len(ids)
        inside = ids[0] >= 0 and ids[-1] < vocab_size
        if not distinct or not inside or vocab_size == len(ids):
            raise DatasetError(
                f"{self.special} in a vocabulary of {vocab_size}: these ids must differ, be below "
                "the size of the vocabulary, and not be all of it"
            )
        self._special_ids = ids
        self._maskable = np.ones(vocab_size, bool)
        self._maskable[ids] = False
        self._starts_word = np.ones(vocab_size, bool)
        if self.config.whole_word_mask:
            known = 0 if self.starts_word is None else len(self.starts_word)
            if known != vocab_size:
                raise DatasetError(
                    f"--whole-word-mask needs to know for each of the {vocab_size} tokens whether "
                    f"it starts a word, but that is known for {known}. Use a tokenizer that marks "
                    "words, such as WordPiece"
                )
            self._starts_word = np.asarray(self.starts_word, bool)
        # Cumulative probabilities of runs of 1, 2, ... words.
        shares = 1 / np.arange(1, self.config.max_ngrams + 1)
        self._ngram_bounds = np.cumsum(shares / shares.sum())[:-1]

    def __call__(self, tokens: np.ndarray, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(what the model sees, int64 [n]; which tokens it has to predict, bool [n]).

        tokens: int64 [n], ids in the vocabulary. numbers: uint32 [n, 4], random words.

        Of m maskable tokens, at most max(1, round(mask_prob * m)) are chosen, and at least 1 when
        m > 0. When every whole word is longer than that, one token of a word is chosen.
        """
        maskable = self._maskable[tokens]
        count = int(maskable.sum())
        chosen = maskable
        if count:
            budget = max(1, round(self.config.mask_prob * count))
            chosen = self._choose(tokens, maskable, budget, numbers)
        return np.where(chosen, self._replacements(tokens, numbers), tokens), chosen

    def _choose(self, tokens, maskable, budget: int, numbers) -> np.ndarray:
        """The maskable tokens to predict, at most `budget` and at least one: bool [n]."""
        # Words start where the vocabulary says, and after a token that cannot be masked.
        begins = maskable & self._starts_word[tokens]
        begins[1:] |= maskable[1:] & ~maskable[:-1]
        begins[0] = maskable[0]
        first = np.flatnonzero(begins)
        order = np.argsort(numbers[first, 0], kind="stable")
        chosen = np.zeros(len(tokens), bool)
        # Words of one token, and no runs: take the first ones of a random order.
        if not self.config.whole_word_mask and self.config.max_ngrams == 1:
            chosen[first[order[:budget]]] = True
            return chosen
        # Otherwise take runs of whole words.
        word = np.cumsum(begins) - 1
        lengths = np.bincount(word[maskable])
        sizes = 1 + np.searchsorted(self._ngram_bounds, numbers[first, 3] / 2**32, side="right")
        taken = _take_words(first, first + lengths, order, sizes=sizes, budget=budget)
        if taken.any():
            return maskable & taken[word]
        # No word fits the budget: take a random token of the first word.
        start = first[order[0]]
        chosen[start + numbers[start, 3] % lengths[order[0]]] = True
        return chosen

    def _replacements(self, tokens, numbers) -> np.ndarray:
        """The replacement of each token, if it is chosen: int64 [n]."""
        # A random id of those that are not special: skip each special one.
        random = (numbers[:, 2].astype(np.int64) * (self.vocab_size - len(self._special_ids))) >> 32
        for special in self._special_ids:
            random += random >= special
        kind = numbers[:, 1] / 2**32
        changed = np.where(kind < MASKED + RANDOM, random, tokens)
        return np.where(kind < MASKED, self.special.mask, changed)


def _take_words(first, stop, order, *, sizes, budget: int) -> np.ndarray:
    """Which words to take, bool [w], at most `budget` tokens in all.

    Word i is tokens [first[i], stop[i]). In the given order, each word begins a run of sizes[i]
    words, if it fits itself; arrays [w]. A run ends early before a word already taken, a special
    token, and a word that exceeds the budget's rest.
    """
    first, stop, order, sizes = (values.tolist() for values in (first, stop, order, sizes))
    taken = [False] * len(first)
    for start in order:
        end = first[start]
        for w in range(start, min(start + sizes[start], len(first))):
            if taken[w] or first[w] != end or stop[w] - end > budget:
                break
            taken[w] = True
            end = stop[w]
            budget -= end - first[w]
        if budget == 0:
            break
    return np.array(taken)
