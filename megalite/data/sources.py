"""The datasets that samples come from, with their weights, and how far each has been used."""

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, zip_longest

from megalite.data.blend import Blend
from megalite.data.indexed import DatasetError


@dataclass(frozen=True)
class Source:
    """One dataset of a blend."""

    weight: float
    """Share of the samples, relative to the other sources' weights."""
    prefix: str
    """Prefix of its files, PREFIX.bin and PREFIX.idx."""


def parse_sources(words: Sequence[str], flag: str = "--data-path") -> tuple[Source, ...]:
    """The sources that a flag such as --data-path names: one prefix, or weight and prefix in turn.

    Raises DatasetError for another pattern, a weight that is not a positive number, or a prefix
    that is given twice.
    """
    if not words:
        return ()
    if len(words) == 1:
        return (Source(1.0, words[0]),)
    sources = {}
    for weight, prefix in zip_longest(words[::2], words[1::2]):
        problem = None
        if not _is_weight(weight):
            problem = f"{weight!r} is not a weight above 0"
        elif prefix is None:
            problem = f"{weight!r} has no prefix after it"
        if problem:
            raise DatasetError(
                f"{flag} {' '.join(words)}: {problem}; give one prefix, or weights and prefixes in "
                "turn: 0.3 a 0.7 b"
            )
        path = os.path.realpath(f"{prefix}.idx")
        if path in sources:
            raise DatasetError(
                f"{flag}: {prefix} given twice; name each dataset once, with the sum of its weights"
            )
        sources[path] = Source(float(weight), prefix)
    return tuple(sources.values())


def _is_weight(text: str) -> bool:
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False


@dataclass(frozen=True)
class UsedSource:
    """A source as a checkpoint records it."""

    prefix: str
    weight: float
    fingerprint: str
    """Identifies its contents, wherever the files lie."""
    consumed: int
    """Samples of it used before `DataState.start`."""

    @property
    def content(self) -> str:
        """The part of the fingerprint that identifies the dataset, without the documents used."""
        return self.fingerprint.partition("[")[0]

    @property
    def documents(self) -> str:
        """The documents used, as the fingerprint has them: [first:last]."""
        return self.fingerprint.removeprefix(self.content)


@dataclass(frozen=True)
class DataState:
    """The data of a run from sample `start` on, and the samples each source had given before.

    The order of the samples is a function of this and the index of the sample alone. It does not
    depend on the rank or the layout.
    """

    order: dict
    """What else the tokens of a sample depend on: seed, sequence length, kind of order."""
    sources: tuple[UsedSource, ...]
    start: int = 0
    """Samples the run had used when these sources and weights took effect."""
    before: tuple[dict, ...] = ()
    """The earlier states of the run, oldest first. `consumed` of their sources is the count at
    their end."""

    def to_json(self) -> dict:
        """The state as plain lists and dicts."""
        return asdict(self)

    @classmethod
    def from_json(cls, stored: dict) -> "DataState":
        """The state that `to_json` gave."""
        sources = tuple(UsedSource(**source) for source in stored["sources"])
        return cls(stored["order"], sources, stored["start"], tuple(stored["before"]))

    def differences(self, other: "DataState") -> list[str]:
        """How `other`, the data of a run that resumes from here, differs; [] when every sample is
        the same.

        The location of a source does not matter. The order in which sources are named does, since
        ties of a blend go by it. Of weights only the ratios matter. What an older checkpoint does
        not record is not compared.
        """
        found = []
        for name, value in other.order.items():
            recorded = self.order.get(name, value)
            if recorded != value:
                found.append(f"{name.replace('_', '-')} {recorded} -> {value}")
        if self._blended() == other._blended():
            return found
        for source in other.sources:
            found += self._source_differences(source)
        kept = {source.content for source in other.sources}
        for source in self.sources:
            if source.content not in kept:
                found.append(f"{source.prefix} is no longer used")
        return found or ["the sources are named in another order"]

    def _source_differences(self, source: UsedSource) -> list[str]:
        """How a source differs from the one here that has the same content."""
        recorded = {own.content: own for own in self.sources}.get(source.content)
        if recorded is None:
            earlier = chain.from_iterable(state["sources"] for state in self.before)
            if any(UsedSource(**stored).content == source.content for stored in earlier):
                return [f"{source.prefix} is back"]
            return [f"{source.prefix} is new, or has other contents"]
        found = []
        if recorded.documents != source.documents:
            change = f"{recorded.documents} -> {source.documents}"
            found.append(f"documents of {source.prefix} {change} (--split)")
        if recorded.weight != source.weight:
            change = f"{recorded.weight:g} -> {source.weight:g}"
            found.append(f"weight of {source.prefix} {change}")
        return found

    def _blend(self) -> Blend:
        return Blend([source.weight for source in self.sources])

    def _blended(self) -> list[tuple[str, float]]:
        """What the blend depends on: (fingerprint, share of the samples) of each source."""
        shares = self._blend().shares.tolist()
        return list(zip((source.fingerprint for source in self.sources), shares, strict=True))

    def with_prefixes_of(self, other: "DataState") -> "DataState":
        """This state with the prefixes and the order of `other`, which has the same sources."""
        pairs = zip(self.sources, other.sources, strict=True)
        sources = tuple(replace(own, prefix=moved.prefix) for own, moved in pairs)
        return replace(self, order=other.order, sources=sources)

    def consumed_at(self, sample: int) -> list[int]:
        """Samples of each source used before sample `sample` >= start of the run."""
        counts = self._blend().counts(sample - self.start).tolist()
        pairs = zip(self.sources, counts, strict=True)
        return [source.consumed + count for source, count in pairs]

    def followed_by(self, other: "DataState", at: int) -> "DataState":
        """`other` from sample `at` on. Each source continues after its last sample, so no sample
        comes again.

        That includes a source that was used earlier, was left out and is back.
        """
        # Record this state as it was at its end.
        pairs = zip(self.sources, self.consumed_at(at), strict=True)
        ended = tuple(replace(source, consumed=count) for source, count in pairs)
        record = replace(self, sources=ended).to_json()
        del record["before"]
        before = (*self.before, record)
        # The last count of every source that was ever used.
        last = {}
        for state in before:
            for source in state["sources"]:
                last[source["fingerprint"]] = source["consumed"]
        sources = tuple(replace(s, consumed=last.get(s.fingerprint, 0)) for s in other.sources)
        return replace(other, sources=sources, start=at, before=before)
