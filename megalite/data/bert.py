"""BERT samples, [CLS] A [SEP] B [SEP] or without a pair task [CLS] A [SEP], of a dataset whose sequences are sentences.

Sample i is a function of (seed, split, i) and the data. It is made of a run of one document (see megalite.data.runs):

    none      the run as it is; runs go on across documents, as RoBERTa's FULL-SENTENCES (Liu et al. 2019)
    sop, nsp  the run is widened to whole sentences that fill the sample, as far as the document goes, and cut in two at
              the sentence border nearest to a random place; what is too much is trimmed
    sop       with probability 1/2 A and B change places
    nsp       with probability 1/2 two runs of different documents exchange their second parts, so none is used more
              often than another. Samples that lie half an epoch apart are partners in this

Trimming takes tokens from the longer part until both are equal, then from both, and leaves a random stretch of each (as
BERT's, Devlin et al. 2018, which takes them from either end at random). So how much a pair has, and where its sentences
are broken off, does not tell what the pair head has to learn. A sentence of more than the tokens of a sample is cut
anywhere. A run of a single token has no pair.

Without a pair task every token of a split is used in every epoch, but for what short samples leave out of their runs
(short_seq_prob). With pairs every run is used, of which other tokens are trimmed in every epoch.
"""

from typing import NamedTuple

import numpy as np

from megalite.data.bert_config import BertDataConfig
from megalite.data.indexed import DatasetError, IndexedDataset
from megalite.data.masking import Masker, SpecialIds
from megalite.data.runs import Run, SentenceRuns
from megalite.data.sampler import first_sample
from megalite.kernels.philox import counters, key_of, philox4x32

DRAWS = 3
"""Random counters of a sample for the choice of its tokens, before those for their masks."""


class BertDataset:
    """`dataset[i]` for any i >= 0, epochs roll on.

    Args:
        indexed: a dataset whose sequences are sentences (tools/preprocess_data.py --split-sentences).
        documents: [first, last) document of the split.
        seq_length: s, tokens in a sample, padding included.
        seed, split_name: with the above and the configuration, all that the samples depend on.
        special: ids that frame a sample; vocab_size, starts_word: see Masker.
        config: how samples are cut, paired and masked.

    Raises DatasetError when the split has no tokens, or for nsp fewer than two documents, when s is too small for a
    frame and two tokens, and for special ids that do not fit the vocabulary.
    """

    def __init__(
        self,
        indexed: IndexedDataset,
        documents: tuple[int, int],
        seq_length: int,
        seed: int,
        split_name: str,
        special: SpecialIds,
        vocab_size: int,
        starts_word: np.ndarray | None = None,
        config: BertDataConfig | None = None,
    ):
        self.config = config or BertDataConfig()
        pair = self.config.bert_pair
        frame = 2 if pair == "none" else 3
        if seq_length < frame + 2:
            raise DatasetError(
                f"--seq-length {seq_length} has no room for two tokens beside [CLS] and [SEP]: give {frame + 2} or more"
            )
        if pair == "nsp" and documents[1] - documents[0] < 2:
            raise DatasetError(
                f"split '{split_name}' has {documents[1] - documents[0]} documents, but next-sentence prediction takes "
                "sentences from another one. Give it a larger share of --split, use more data, or --bert-pair sop"
            )
        self.seq_length, self.max_tokens = seq_length, seq_length - frame
        self.special, self.vocab_size, self.split_name = special, vocab_size, split_name
        self.runs = SentenceRuns(
            indexed, documents, self.max_tokens, seed, split_name, across=pair == "none"
        )
        self._masker = Masker(special, vocab_size, starts_word, self.config)
        self._key = key_of(seed, "bert sample", split_name)

    @property
    def samples_per_epoch(self) -> int:
        """After this many samples every run has been used at least once, and a new order begins."""
        return self.runs.per_epoch

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        """Sample i.

        tokens int64 [s]: what the model sees. labels int64 [s]: the same before masking. loss_mask float32 [s]: 1 where
        a token is to be predicted. token_types int64 [s]: 1 for B and its [SEP]. segments int64 [s]: 1, padding 0.
        pair_label int64: 1 when B is of a random document (nsp) or A and B are swapped (sop). pair_mask float32: 0 when
        there is no pair, else 1.

        Raises IndexError below 0, DatasetError for an id outside the vocabulary.
        """
        i = int(i)
        if i < 0:
            raise IndexError(f"sample {i}: samples count from 0")
        numbers = self._numbers(i, DRAWS + self.seq_length)
        parts, label = self._parts(i, _Draws.of(numbers))
        labels = np.full(self.seq_length, self.special.pad, np.int64)
        token_types, segments, loss_mask = (
            np.zeros_like(labels),
            np.zeros_like(labels),
            np.zeros_like(labels, "f4"),
        )
        labels[0], length = self.special.cls, 1
        for number, part in enumerate(parts):
            stop = length + part.stop - part.start
            labels[length:stop], labels[stop] = self._read(part), self.special.sep
            token_types[length : stop + 1] = number
            length = stop + 1
        segments[:length] = 1
        tokens = labels.copy()
        tokens[:length], loss_mask[:length] = self._masker(
            labels[:length], numbers[DRAWS : DRAWS + length]
        )
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
        """The first of the random numbers of sample i, uint32 [count, 4]: its draws, then one row for each token."""
        return philox4x32(counters(i * (DRAWS + self.seq_length), count), self._key)

    def _parts(self, i: int, own: "_Draws") -> tuple[list[Run], int | None]:
        """The one or two segments of sample i, and the label of the pair, None where it is none."""
        pair = self.config.bert_pair
        if pair == "none":
            return [self._run(i, own, own)], None
        partner = self._partner(i) if pair == "nsp" else i
        other = own if partner == i else _Draws.of(self._numbers(partner, DRAWS))
        shared = own if i <= partner else other
        target, label = self._target(shared), shared.coin >> 31
        halves = self._halves(self._run(i, own, shared), target, shared)
        if len(halves) == 1:
            return halves, None
        first, second = halves
        if pair == "nsp" and label:
            theirs = self._halves(self._run(partner, other, shared), target, shared)
            label = int(len(theirs) == 2 and theirs[0].document != first.document)
            # Their part is as long as one of this run's own would be, or its length would tell.
            second = self._widened(theirs[1], target - first.size) if label else second
        parts = [first, second][:: -1 if pair == "sop" and label else 1]
        return _trim(*parts, target, own), label

    def _partner(self, i: int) -> int:
        """The sample that i exchanges second parts with, whose partner it is; i itself when it is the odd one out."""
        half = self.samples_per_epoch // 2
        position = i % self.samples_per_epoch
        return i if position >= 2 * half else i + half if position < half else i - half

    def _target(self, draws: "_Draws") -> int:
        """At most how many tokens of text a sample has."""
        short = draws.short < self.config.short_seq_prob * 2**32
        return 2 + (draws.target * (self.max_tokens - 1) >> 32) if short else self.max_tokens

    def _run(self, i: int, own: "_Draws", shared: "_Draws") -> Run:
        """The run of sample i, or a part of the target length from a sentence's beginning where one fits."""
        run = self.runs(*divmod(i, self.samples_per_epoch), own.spare)
        spare = run.size - self._target(shared)
        if spare <= 0:
            return run
        start = run.start + (own.start * (spare + 1) >> 32)
        start = max(run.start, self.runs.sentence(run.document, start)[0])
        return Run(run.document, start, start + self._target(shared))

    def _halves(self, run: Run, target: int, draws: "_Draws") -> list[Run]:
        """The run, widened to whole sentences of `target` tokens or more, cut in two at the sentence border nearest to
        a random place, or there if none lies within it; only the run if that is a single token."""
        begin = self.runs.sentence(run.document, run.start)[0]
        start = begin if run.start - begin <= self.max_tokens else run.start
        document, start, stop = whole = self._widened(Run(run.document, start, run.stop), target)
        if whole.size < 2:
            return [whole]
        place = start + (draws.place * whole.size >> 32)
        borders = [
            border for border in self.runs.sentence(document, place) if start < border < stop
        ]
        cut = (
            min(borders, key=lambda border: abs(border - place))
            if borders
            else max(place, start + 1)
        )
        return [Run(document, start, cut), Run(document, cut, stop)]

    def _widened(self, run: Run, size: int) -> Run:
        """The run, moved on to the end of the sentence of its last token, or of that with which it has `size` tokens,
        as far as its document goes. The rest of a sentence of more than a sample's tokens is left."""
        document, start, stop = run
        stop = max(stop, min(start + size, self.runs.end(document)))
        end = self.runs.sentence(document, stop - 1)[1]
        return Run(document, start, end if end - stop < self.max_tokens else stop)

    def _read(self, run: Run) -> np.ndarray:
        tokens = self.runs.stream.read(run.start, run.stop).astype(np.int64)
        if not 0 <= tokens.min() <= tokens.max() < self.vocab_size:
            worst = tokens.min() if tokens.min() < 0 else tokens.max()
            raise DatasetError(
                f"split '{self.split_name}', token {run.start} and after: id {worst}, but the vocabulary has "
                f"{self.vocab_size} entries. The data was made with another tokenizer, or --vocab-size is too small"
            )
        return tokens

    def fingerprint(self) -> str:
        """Tells the data that the samples come from; see IndexedDataset.fingerprint."""
        return self.runs.stream.fingerprint()


class _Draws(NamedTuple):
    """The random numbers of a sample: `spare` of 64 bits, the others of 32. Partners share those from `short` on."""

    spare: int
    start: int
    trim_a: int
    trim_b: int
    short: int
    target: int
    place: int
    coin: int

    @classmethod
    def of(cls, numbers: np.ndarray) -> "_Draws":
        """From uint32 [DRAWS or more, 4]."""
        low, high, *words = numbers[:DRAWS].reshape(-1).tolist()
        return cls(low | high << 32, *words[: len(cls._fields) - 1])


def _trim(a: Run, b: Run, target: int, draws: _Draws) -> list[Run]:
    """A and B with `target` tokens at most: the longer one loses some until they are equal, then both. What is left of
    each is a random stretch of it."""
    sizes = a.size, b.size
    if sum(sizes) <= target:
        return [a, b]
    keep = min(sizes[0], max(target - sizes[1], target - target // 2))
    trimmed = []
    for run, size, kept, word in zip(
        (a, b), sizes, (keep, target - keep), (draws.trim_a, draws.trim_b), strict=True
    ):
        start = run.start + (word * (size - kept + 1) >> 32)
        trimmed.append(Run(run.document, start, start + kept))
    return trimmed


class BertLoader:
    """Microbatches of one data-parallel rank, as BatchLoader gives them for GPT: it has no position.

    Args:
        dataset: BertDataset.
        micro_batch_size: b, rows in a microbatch.
        data_size, data_rank: the data-parallel size and this rank's place in it.
    """

    fields = frozenset(
        ("tokens", "token_types", "segments", "labels", "loss_mask", "pair_label", "pair_mask")
    )
    """Names of the arrays in a batch."""

    def __init__(self, dataset: BertDataset, micro_batch_size: int, data_size: int, data_rank: int):
        if micro_batch_size < 1 or not 0 <= data_rank < data_size:
            raise ValueError(
                f"no batches of {micro_batch_size} samples for data-parallel rank {data_rank} of {data_size}"
            )
        self.dataset = dataset
        self.micro_batch_size, self.data_size, self.data_rank = (
            micro_batch_size,
            data_size,
            data_rank,
        )

    def batch(self, consumed: int, microbatch: int) -> dict[str, np.ndarray]:
        """Microbatch number `microbatch` of the step before which `consumed` samples were used: the arrays of
        BertDataset, stacked to [b, s], the pair's label and mask to [b]."""
        first = first_sample(
            consumed, microbatch, self.micro_batch_size, self.data_size, self.data_rank
        )
        samples = [self.dataset[first + j] for j in range(self.micro_batch_size)]
        return {name: np.stack([sample[name] for sample in samples]) for name in samples[0]}
