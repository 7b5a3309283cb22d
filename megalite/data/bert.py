"""BERT samples of datasets whose sequences are sentences: [CLS] A [SEP] B [SEP] or [CLS] A [SEP].

Sample i is a function of (seed, split, i) and the data. It is made of a run of tokens of one
document (see megalite.data.runs), by the task of the pair head (--bert-pair):

    none      no pair: the run as it is. Runs cross the borders of documents, as in RoBERTa's
              FULL-SENTENCES (Liu et al. 2019)
    sop, nsp  the run is widened to whole sentences that fill the sample, as far as the document
              goes, and cut in two at the sentence border nearest to a random position; then it is
              trimmed
    sop       with probability 1/2 A and B are swapped
    nsp       with probability 1/2 two runs of different documents exchange their second segments,
              so none is used more often than another. Samples half an epoch apart are partners

Trimming takes tokens from the longer segment until both are equal, then from both, and keeps a
random stretch of each (BERT, Devlin et al. 2018, removes tokens from either end at random). So
neither the length of a pair nor the position at which its sentences are broken reveals the label. A
sentence longer than a sample is cut anywhere. A run of a single token has no pair.

Without a pair task every token of a split is used in every epoch, except those that short samples
leave out (short_seq_prob). With pairs every run is used in every epoch, with other tokens trimmed.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from megalite.data.indexed import DatasetError, IndexedDataset, check_ids
from megalite.data.masking import Masker, frame
from megalite.data.runs import Run, SentenceRuns
from megalite.kernels.philox import counters, key_of, philox4x32

DRAWS = 3
"""Random counters of a sample for the choice of its tokens, before those for their masks."""


@dataclass(eq=False)
class BertDataset:
    """BERT samples: `dataset[i]` for any i >= 0, over any number of epochs.

    They depend on the fields alone. Raises DatasetError when the split has no tokens, or for nsp
    fewer than two documents, and when s is too small for a frame and two tokens.
    """

    indexed: IndexedDataset
    """Its sequences are sentences (preprocess_data.py --split-sentences)."""
    documents: tuple[int, int]
    """[first, last) document of the split."""
    seq_length: int
    """s, tokens in a sample, padding included."""
    masker: Masker
    """Masks samples; has the ids that frame them, and the configuration."""
    seed: int
    split: str

    def __post_init__(self):
        self.config = self.masker.config
        pair = self.config.bert_pair
        frame = 2 if pair == "none" else 3
        if self.seq_length < frame + 2:
            raise DatasetError(
                f"--seq-length {self.seq_length} has no room for two tokens beside [CLS] and "
                f"[SEP]: give {frame + 2} or more"
            )
        count = self.documents[1] - self.documents[0]
        if pair == "nsp" and count < 2:
            raise DatasetError(
                f"split '{self.split}' has {count} documents, but next-sentence prediction takes "
                "sentences from another document. Give it a larger share of --split, use more "
                "data, or --bert-pair sop"
            )
        self.max_tokens = self.seq_length - frame
        order = {"seed": self.seed, "split": self.split, "across": pair == "none"}
        self.runs = SentenceRuns(self.indexed, self.documents, self.max_tokens, **order)
        self._key = key_of(self.seed, "bert sample", self.split)

    @property
    def samples_per_epoch(self) -> int:
        """After this many samples every run has been used at least once, and a new order begins."""
        return self.runs.per_epoch

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        """Sample i:

            tokens       int64 [s], what the model sees
            labels       int64 [s], the tokens before masking
            loss_mask    float32 [s], 1 where a token is to be predicted
            token_types  int64 [s], 1 for B and its [SEP]
            segments     int64 [s], 1, and 0 for padding
            pair_label   int64, 1 when B is from another document (nsp) or A and B are swapped (sop)
            pair_mask    float32, 1, and 0 when there is no pair

        Raises IndexError below 0, and DatasetError for an id outside the vocabulary.
        """
        i = int(i)
        if i < 0:
            raise IndexError(f"sample {i}: samples count from 0")
        numbers = self._numbers(i, DRAWS + self.seq_length)
        parts, label = self._segments(i, _Draws.of(numbers))
        # Frame the text.
        special = self.masker.special
        row = frame(special, *map(self._read, parts))
        length = len(row)
        labels = np.full(self.seq_length, special.pad, np.int64)
        labels[:length] = row
        token_types = np.zeros_like(labels)
        token_types[parts[0].size + 2 : length] = 1
        segments = np.zeros_like(labels)
        segments[:length] = 1
        # Mask it.
        tokens = labels.copy()
        loss_mask = np.zeros(self.seq_length, np.float32)
        words = numbers[DRAWS : DRAWS + length]
        tokens[:length], loss_mask[:length] = self.masker(row, words)
        return {
            "tokens": tokens,
            "token_types": token_types,
            "segments": segments,
            "labels": labels,
            "loss_mask": loss_mask,
            "pair_label": np.int64(label or 0),
            "pair_mask": np.float32(label is not None),
        }

    def _numbers(self, i: int, count: int) -> np.ndarray:
        """The first random numbers of sample i, uint32 [count, 4]: DRAWS rows, then one a token."""
        return philox4x32(counters(i * (DRAWS + self.seq_length), count), self._key)

    def _segments(self, i: int, own: "_Draws") -> tuple[list[Run], int | None]:
        """(the one or two segments of sample i, the label of the pair or None without a pair)."""
        pair = self.config.bert_pair
        if pair == "none":
            return [self._run(i, own, own)], None
        # Partners share the draws of the one that comes first.
        partner = self._partner(i) if pair == "nsp" else i
        other = own
        if partner != i:
            other = _Draws.of(self._numbers(partner, DRAWS))
        shared = own if i <= partner else other
        target = self._target(shared)
        label = shared.coin >> 31
        halves = self._halves(self._run(i, own, shared), target, shared)
        if len(halves) == 1:
            return halves, None
        first, second = halves
        if pair == "nsp" and label:
            theirs = self._halves(self._run(partner, other, shared), target, shared)
            label = int(len(theirs) == 2 and theirs[0].document != first.document)
            if label:
                # As long as a second half of this run would be, or its length would tell.
                second = self._widened(theirs[1], target - first.size)
        if pair == "sop" and label:
            first, second = second, first
        return _trim(first, second, target, own), label

    def _partner(self, i: int) -> int:
        """The sample that i exchanges second segments with, and which exchanges them with i; i
        itself when it is the odd one out."""
        half = self.samples_per_epoch // 2
        position = i % self.samples_per_epoch
        if position >= 2 * half:
            return i
        return i + half if position < half else i - half

    def _target(self, draws: "_Draws") -> int:
        """The largest number of text tokens that a sample may have."""
        if draws.short < self.config.short_seq_prob * 2**32:
            return 2 + (draws.target * (self.max_tokens - 1) >> 32)
        return self.max_tokens

    def _run(self, i: int, own: "_Draws", shared: "_Draws") -> Run:
        """The run of sample i, or for a shorter target a stretch of it, which starts at the
        beginning of a sentence when that fits."""
        epoch, position = divmod(i, self.samples_per_epoch)
        run = self.runs(epoch, position, own.spare)
        target = self._target(shared)
        spare = run.size - target
        if spare <= 0:
            return run
        start = run.start + (own.start * (spare + 1) >> 32)
        sentence, _ = self.runs.sentence(run.document, start)
        start = max(run.start, sentence)
        return Run(run.document, start, start + target)

    def _halves(self, run: Run, target: int, draws: "_Draws") -> list[Run]:
        """The run, widened to whole sentences of `target` tokens or more, cut in two; or just the
        run, when that is a single token.

        The cut is the sentence border nearest to a random position, or that position when no border
        lies within the run.
        """
        start, _ = self.runs.sentence(run.document, run.start)
        if run.start - start > self.max_tokens:
            start = run.start
        whole = self._widened(Run(run.document, start, run.stop), target)
        if whole.size < 2:
            return [whole]
        position = start + (draws.cut * whole.size >> 32)
        sentence = self.runs.sentence(run.document, position)
        borders = [border for border in sentence if start < border < whole.stop]
        if borders:
            cut = min(borders, key=lambda border: abs(border - position))
        else:
            cut = max(position, start + 1)
        return [Run(run.document, start, cut), Run(run.document, cut, whole.stop)]

    def _widened(self, run: Run, size: int) -> Run:
        """The run, extended to the end of its last sentence, or of the sentence with which it has
        `size` tokens, within its document. The rest of a sentence is left out when it has as many
        tokens as a sample."""
        document, start, stop = run
        stop = max(stop, min(start + size, self.runs.end(document)))
        _, end = self.runs.sentence(document, stop - 1)
        if end - stop < self.max_tokens:
            stop = end
        return Run(document, start, stop)

    def _read(self, run: Run) -> np.ndarray:
        tokens = self.runs.stream.read(run.start, run.stop)
        location = f"split '{self.split}', token {run.start} and after"
        check_ids(tokens, self.masker.vocab_size, location)
        return tokens

    def fingerprint(self) -> str:
        """Identifies the tokens that the samples are made of; see IndexedDataset.fingerprint."""
        return self.runs.stream.fingerprint()


class _Draws(NamedTuple):
    """The random numbers of a sample: `spare` of 64 bits, the others of 32. Partners share those
    from `short` on."""

    spare: int
    start: int
    trim_a: int
    trim_b: int
    short: int
    target: int
    cut: int
    coin: int

    @classmethod
    def of(cls, numbers: np.ndarray) -> "_Draws":
        """From uint32 [DRAWS or more, 4]."""
        low, high, *words = numbers[:DRAWS].reshape(-1).tolist()
        return cls(low | high << 32, *words[: len(cls._fields) - 1])


def _trim(a: Run, b: Run, target: int, draws: _Draws) -> list[Run]:
    """A and B with at most `target` tokens in all: the longer one is trimmed until they are equal,
    then both. What is kept of each is a random stretch of it."""
    if a.size + b.size <= target:
        return [a, b]
    kept = min(a.size, max(target - b.size, target - target // 2))
    return [_stretch(a, kept, draws.trim_a), _stretch(b, target - kept, draws.trim_b)]


def _stretch(run: Run, size: int, word: int) -> Run:
    """`size` consecutive tokens of a run. word: random in [0, 2^32), decides which."""
    start = run.start + (word * (run.size - size + 1) >> 32)
    return Run(run.document, start, start + size)
