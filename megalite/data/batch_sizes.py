"""The size of each global batch, which may grow while the training starts. Imports no torch."""

from bisect import bisect_right
from dataclasses import dataclass

Point = tuple[int, int]
"""(iterations done, samples consumed)."""
START = (0, 0)


@dataclass(frozen=True)
class BatchSizes:
    """Samples in each global batch, as a function of the samples consumed before it.

    A ramp begins with batches of `start` samples and adds `increment` each time another
    samples / steps samples are consumed, where steps = (final - start) / increment; from `samples`
    on, batches have `final` samples. These are the batches of Megatron-LM's --rampup-batch-size.
    """

    final: int
    start: int | None = None
    """None: no ramp."""
    increment: int = 1
    samples: int = 0

    @classmethod
    def from_words(cls, final: int, words: tuple[str, ...] | None) -> "BatchSizes":
        """As --rampup-batch-size START INCREMENT SAMPLES says, or without a ramp. The three may be
        one text.

        Raises ValueError with the reason where the words are no ramp to `final`.
        """
        if words is None:
            return cls(final)
        words = " ".join(words).split()
        if len(words) != 3 or not all(word.isdecimal() and int(word) > 0 for word in words):
            raise ValueError("is not three whole numbers above 0, START INCREMENT SAMPLES")
        start, increment, samples = map(int, words)
        aim = f"--global-batch-size {final}"
        if start > final:
            raise ValueError(f"starts above {aim}")
        if start == final:
            raise ValueError(f"has no effect: it starts at {aim}")
        if (final - start) % increment:
            raise ValueError(
                f"does not lead to {aim}: {final} - {start} is not a multiple of {increment}"
            )
        return cls(final, start, increment, samples)

    @property
    def words(self) -> tuple[str, str, str] | None:
        """START INCREMENT SAMPLES; None without a ramp."""
        if self.start is None:
            return None
        return str(self.start), str(self.increment), str(self.samples)

    def at(self, consumed: int) -> int:
        """Size of the global batch that starts after `consumed` samples."""
        if self.start is None or consumed >= self.samples:
            return self.final
        return self.start + consumed * self._steps // self.samples * self.increment

    def consumed_after(self, iterations: int, since: Point = START) -> int:
        """Samples consumed after this many iterations, if batches have these sizes from the point
        `since` on."""
        phases = self._phases(since)
        index = bisect_right(phases, iterations, key=lambda phase: phase[0]) - 1
        first, consumed, size = phases[index]
        return consumed + (iterations - first) * size

    def iterations_within(self, samples: int, since: Point = START) -> int:
        """The most iterations that consume no more than this many samples, if batches have these
        sizes from the point `since` on."""
        phases = self._phases(since)
        index = bisect_right(phases, samples, key=lambda phase: phase[1]) - 1
        first, consumed, size = phases[index]
        return first + (samples - consumed) // size

    @property
    def _steps(self) -> int:
        """Increments of the ramp."""
        return (self.final - self.start) // self.increment

    def _phases(self, since: Point) -> list[tuple[int, int, int]]:
        """(iterations before it, samples consumed before it, batch size) of each time of one
        size."""
        iterations, consumed = since
        phases = []
        for step in range(self._steps if self.start is not None else 0):
            # A batch that starts before the end of its phase is not cut short.
            end = -(-(step + 1) * self.samples // self._steps)
            size = self.start + step * self.increment
            count = max(0, -(-(end - consumed) // size))
            if count:
                phases.append((iterations, consumed, size))
            iterations += count
            consumed += count * size
        return [*phases, (iterations, consumed, self.final)]
