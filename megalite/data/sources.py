"""What the samples come from: weighted datasets, and how far each has been used."""

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from megalite.data.blend import Blend
from megalite.data.indexed import DatasetError


@dataclass(frozen=True)
class Source:
    """One dataset of a blend."""

    weight: float
    """Share of the samples, relative to the other sources' weights."""
    prefix: str
    """Where it lies: PREFIX.bin and PREFIX.idx."""


def parse_sources(words: Sequence[str], flag: str = "--data-path") -> tuple[Source, ...]:
    """The sources that `--data-path` asks for: one prefix, or weights and prefixes in turn.

    Raises DatasetError for another pattern, a weight that is no positive number, or a prefix given twice.
    """
    if not words:
        return ()
    if len(words) == 1:
        return (Source(1.0, words[0]),)
    weights, prefixes = words[::2], words[1::2]
    wrong = [text for text in weights if not _is_weight(text)]
    if wrong or len(words) % 2:
        blamed = (
            f"{wrong[0]!r} is no weight above 0"
            if wrong
            else f"{words[-1]!r} has no prefix after it"
        )
        raise DatasetError(
            f"{flag} {' '.join(words)}: {blamed}; give one prefix, or weights and prefixes in turn: 0.3 a 0.7 b"
        )
    places = [os.path.realpath(f"{prefix}.idx") for prefix in prefixes]
    repeated = [
        prefix for number, prefix in enumerate(prefixes) if places[number] in places[:number]
    ]
    if repeated:
        raise DatasetError(
            f"{flag}: {', '.join(repeated)} given twice; name each once, with the sum of its weights"
        )
    return tuple(
        Source(float(weight), prefix) for weight, prefix in zip(weights, prefixes, strict=True)
    )


def _is_weight(text: str) -> bool:
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False


@dataclass(frozen=True)
class UsedSource:
    """A source as a checkpoint remembers it."""

    prefix: str
    weight: float
    fingerprint: str
    """Tells its content from other content, wherever it lies."""
    consumed: int
    """Samples of it used before `DataState.start`."""

    @property
    def content(self) -> str:
        """The part of the fingerprint that tells the dataset, without the documents that are taken of it."""
        return self.fingerprint.partition("[")[0]

    @property
    def documents(self) -> str:
        """The documents, as the fingerprint has them: [first:last]."""
        return self.fingerprint.removeprefix(self.content)


@dataclass(frozen=True)
class DataState:
    """Which data a run uses from sample `start` on, and what each source had given before. Knows no rank and no layout.

    The order of the samples is a function of this and the number of the sample alone.
    """

    order: dict
    """What else decides which tokens a sample has: seed, sequence length, kind of order."""
    sources: tuple[UsedSource, ...]
    start: int = 0
    """Samples the run had used when these sources and weights came into force."""
    before: tuple[dict, ...] = ()
    """The earlier states of the run, oldest first; what their sources had given at their end is `consumed` there."""

    def to_json(self) -> dict:
        """As plain lists and dicts."""
        return asdict(self)

    @classmethod
    def from_json(cls, stored: dict) -> "DataState":
        """What `to_json` gave."""
        sources = tuple(UsedSource(**source) for source in stored["sources"])
        return cls(stored["order"], sources, stored["start"], tuple(stored["before"]))

    def differences(self, other: "DataState") -> list[str]:
        """What `other`, the data of a run that goes on from here, has otherwise; [] when every sample is the same.

        Where a source lies does not matter, nor in which order sources are named, but the blend goes by that order. Of
        weights only their ratios matter. What an older checkpoint does not tell of the order is not compared.
        """
        found = [
            f"{name.replace('_', '-')} {self.order[name]} -> {value}"
            for name, value in other.order.items()
            if self.order.get(name, value) != value
        ]
        if self._blended() == other._blended():
            return found
        known = {source.content: source for source in self.sources}
        earlier = {
            UsedSource(**source).content for state in self.before for source in state["sources"]
        }
        for source in other.sources:
            was = known.get(source.content)
            if was is None:
                back = source.content in earlier
                found.append(
                    f"{source.prefix} is {'back' if back else 'new, or has other contents'}"
                )
                continue
            if was.documents != source.documents:
                found.append(
                    f"documents of {source.prefix} {was.documents} -> {source.documents} (--split)"
                )
            if was.weight != source.weight:
                found.append(f"weight of {source.prefix} {was.weight:g} -> {source.weight:g}")
        kept = {source.content for source in other.sources}
        found += [
            f"{source.prefix} is no longer used"
            for source in self.sources
            if source.content not in kept
        ]
        return found or ["the sources are named in another order"]

    def _blended(self) -> list[tuple[str, float]]:
        """What the blend goes by: (fingerprint, share of the samples) of each source."""
        shares = Blend([source.weight for source in self.sources]).shares
        return [(source.fingerprint, float(share)) for source, share in zip(self.sources, shares)]

    def at_places_of(self, other: "DataState") -> "DataState":
        """This state with the prefixes of `other`, which has the same sources, and all that it tells of the order."""
        moved = zip(self.sources, other.sources, strict=True)
        sources = tuple(replace(mine, prefix=theirs.prefix) for mine, theirs in moved)
        return replace(self, order=other.order, sources=sources)

    def consumed_at(self, sample: int) -> list[int]:
        """Samples of each source used before sample number `sample` >= start of the run."""
        counts = Blend([source.weight for source in self.sources]).counts(sample - self.start)
        return [
            source.consumed + int(count) for source, count in zip(self.sources, counts, strict=True)
        ]

    def followed_by(self, other: "DataState", at: int) -> "DataState":
        """`other` from sample `at` on, each source going on where it was: no sample of it comes again.

        A source that was used earlier, was left out and is back goes on from there too.
        """
        used = zip(self.sources, self.consumed_at(at), strict=True)
        ended = replace(
            self, sources=tuple(replace(s, consumed=count) for s, count in used), before=()
        )
        before = (
            *self.before,
            {key: value for key, value in ended.to_json().items() if key != "before"},
        )
        last = {
            source["fingerprint"]: source["consumed"]
            for state in before
            for source in state["sources"]
        }
        sources = tuple(replace(s, consumed=last.get(s.fingerprint, 0)) for s in other.sources)
        return replace(other, sources=sources, start=at, before=before)
