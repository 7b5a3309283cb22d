"""Compare the records of two layouts: do they differ by more than rounding explains?"""

import itertools
import re
from dataclasses import dataclass, field
from math import inf, sqrt
from pathlib import Path

import torch

from megalite.nn.config import ModelConfig
from megalite.parallel.boxes import Box
from megalite.verify.record import (
    ACTIVATION,
    ACTIVATION_GRADIENT,
    GRADIENT,
    LOSS,
    RecordedShard,
    read_shards,
)

UNIT_ROUNDOFF = {"fp64": 2.0**-53, "fp32": 2.0**-24, "bf16": 2.0**-8, "fp16": 2.0**-11}
COLUMNS = 5
"""Number of layers side by side in a table of the report."""
WIDE_TOLERANCE = 0.1
"""A tolerance above this share of a tensor's largest entry can hide faults."""


@dataclass(frozen=True)
class Rounding:
    """How far two correct computations may lie apart, relative to the largest entry.

    n roundings in a row, each of relative size u at most and as good as random, add up to about
    sqrt(n) u, and exceed 4 sqrt(n) u with a probability below 1e-3 (Higham and Mary 2019,
    theorem 2.4); two computations, twice that.

    A path goes through 4 products and about 6 other operations a layer, forward or backward, one
    product more at the output layer, and 2 sums in the embedding. In fp32 and fp64 each step of a
    product's sum rounds, over the longest one in the model; in half precision products are summed
    in fp32 and only each operation's result rounds.
    """

    model: ModelConfig
    precision: str
    """fp64, fp32, bf16 or fp16."""
    tokens: int
    """In the global batch: the number of terms in the sum of a weight's gradient."""

    def activation(self, name: str) -> float:
        """Bound for a module's output, or for the loss: roundings of the forward so far."""
        return self._bound(*self._forward(name))

    def gradient(self, name: str) -> float:
        """Bound for the gradient of a parameter or of a module's output.

        It counts the roundings of the whole forward and of the backward so far.
        """
        products, others = self._forward(LOSS)
        layers = self.model.num_layers - self._layers_below(name)
        return self._bound(products + 4 * layers + 1, others + 6 * layers)

    def _forward(self, name: str) -> tuple[int, int]:
        """Products and other operations of the forward, up to and including this module."""
        layers = self._layers_below(name) + int(name.startswith("layers."))
        return 4 * layers + int(name == LOSS), 6 * layers + 2

    def _layers_below(self, name: str) -> int:
        layer, _ = split_name(name)
        if layer is not None:
            return layer
        return 0 if name.startswith("embedding") else self.model.num_layers

    def _bound(self, products: int, others: int) -> float:
        model = self.model
        longest = 1
        if self.precision not in ("bf16", "fp16"):
            longest = max(model.vocab_size, model.ffn, model.hidden_size, self.tokens)
        return 2 * 4 * sqrt(products * longest + others) * UNIT_ROUNDOFF[self.precision]


@dataclass
class Difference:
    """How one global tensor of the chosen layout differs from the reference's."""

    kind: str
    name: str
    """Of the module or parameter; LOSS for the loss."""
    tolerance: float
    largest: float = 0.0
    """Relative to the largest entry of this tensor in any layer.

    inf for NaN, or if no rank computes some element.
    """
    at: tuple[int, ...] = ()
    """Index of the largest difference in the global tensor."""
    ranks: list[int] = field(default_factory=list)
    """Ranks that exceed the tolerance."""

    @property
    def exceeds(self) -> bool:
        """Whether rounding does not explain it."""
        return not self.largest <= self.tolerance

    def __str__(self) -> str:
        label = f"{self.name} ({self.kind}):"
        if self.largest == inf and not self.ranks:
            return f"{label} no rank computes all of it"
        text = f"{label} difference {self.largest:.0e}, tolerance {self.tolerance:.0e}"
        if self.ranks:
            # The index: `sample 3 position 5`, `microbatch 1` or, of a parameter, `index [4, 0]`.
            axes = ("microbatch",) if self.kind == LOSS else ("sample", "position")
            where = " ".join(f"{axis} {i}" for axis, i in zip(axes, self.at))
            if self.kind == GRADIENT or not self.at:
                where = f"index {list(self.at)}"
            noun = "rank" if len(self.ranks) == 1 else "ranks"
            text += f"; largest at {where}; {noun} {', '.join(map(str, self.ranks))}"
        return text


@dataclass(frozen=True)
class Comparison:
    """Every difference, in the order of the computation: forward, then backward."""

    differences: list[Difference]
    losses: tuple[float, float]
    """Of the reference and of the chosen layout."""

    @property
    def first(self) -> Difference | None:
        """The first difference that rounding does not explain; None if rounding explains all."""
        return next((d for d in self.differences if d.exceeds), None)

    @property
    def verdict(self) -> str:
        """The result in one line."""
        if self.first is not None:
            return f"DIFFERENT: first at {self.first}"
        closest = max(self.differences, key=lambda d: d.largest / d.tolerance)
        verdict = (
            f"same numbers: largest difference {closest.largest:.0e} of tolerance "
            f"{closest.tolerance:.0e}, at {closest.name} ({closest.kind})"
        )
        widest = max(self.differences, key=lambda d: d.tolerance).tolerance
        if widest > WIDE_TOLERANCE:
            verdict += (
                f"; but rounding explains up to {widest:.1f} of a tensor here: "
                "add --precision fp64 for a proof"
            )
        return verdict


def split_name(name: str) -> tuple[int | None, str]:
    """The layer that a module or parameter belongs to, None outside the layers, and its family: the
    name without the layer. Differences are relative to the largest entry of a family."""
    match = re.fullmatch(r"(?:layers\.(\d+)\.)?(.*)", name)
    return int(match[1]) if match[1] else None, match[2]


Key = tuple[str, str]
"""Kind and name: what identifies a global tensor in a record."""


def compare(
    reference: Path, reference_ranks: int, chosen: Path, ranks: int, rounding: Rounding
) -> Comparison:
    """Compare the records of two layouts.

    Every rank's shards of the chosen layout, replicas included, are compared with the reference's
    tensors. `reference` and `chosen` are the folders that `record` wrote into.
    """
    # Assemble the reference's tensors and the largest entry of each family.
    expected = _read_whole(reference, reference_ranks)
    scales = _largest_entries(expected)
    # Start each tensor with no difference and no element covered.
    found: dict[Key, Difference] = {}
    covered: dict[Key, torch.Tensor] = {}
    for key, whole in expected.items():
        bound = rounding.activation if key[0] in (ACTIVATION, LOSS) else rounding.gradient
        found[key] = Difference(*key, bound(key[1]))
        covered[key] = torch.zeros(whole.shape, dtype=torch.bool)
    # Measure the shards of every rank of the chosen layout.
    loss = torch.zeros_like(expected[LOSS, LOSS])
    for rank in range(ranks):
        for shard in read_shards(chosen, rank):
            key = (shard.kind, shard.name)
            if key not in expected:
                found[key] = Difference(*key, tolerance=0.0, largest=inf, ranks=[rank])
                continue
            index = _index(shard)
            covered[key][index] = True
            _, family = split_name(shard.name)
            scale = scales[shard.kind, family]
            _measure(found[key], shard, expected[key][index], scale=scale, rank=rank)
            if shard.kind == LOSS:
                loss[index] = shard.values.double()
    # An element that no rank computed is an infinite difference of no rank.
    for key, mask in covered.items():
        if not mask.all():
            found[key].largest = inf
            found[key].ranks = []
    losses = (expected[LOSS, LOSS].sum().item(), loss.sum().item())
    return Comparison(_in_order(found), losses)


def _read_whole(folder: Path, ranks: int) -> dict[Key, torch.Tensor]:
    """The global tensors of a record, in float64."""
    tensors: dict[Key, torch.Tensor] = {}
    for rank in range(ranks):
        for shard in read_shards(folder, rank):
            empty = torch.zeros(shard.global_shape, dtype=torch.float64)
            whole = tensors.setdefault((shard.kind, shard.name), empty)
            whole[_index(shard)] = shard.values.double()
    return tensors


def _largest_entries(tensors: dict[Key, torch.Tensor]) -> dict[Key, float]:
    """The largest finite magnitude by kind and family."""
    scales: dict[Key, float] = {}
    for (kind, name), whole in tensors.items():
        key = (kind, split_name(name)[1])
        largest = whole.nan_to_num(0.0, 0.0, 0.0).abs().max().item()
        scales[key] = max(scales.get(key, 0.0), largest)
    return scales


def _index(shard: RecordedShard) -> tuple[slice, ...]:
    """Indices of a shard in its global tensor."""
    return shard.box.slices_in(Box.whole(shard.global_shape))


def _measure(
    found: Difference, shard: RecordedShard, expected: torch.Tensor, scale: float, rank: int
) -> None:
    """Update the difference of a tensor with one rank's shard of it."""
    if not shard.box.numel:
        return
    values = shard.values.double()
    difference = (values - expected).abs().nan_to_num(nan=inf) / (scale or 1.0)
    difference[values == expected] = 0.0  # infinities of one sign are equal
    largest = difference.max().item()
    if largest > found.largest:
        found.largest = largest
        index = torch.unravel_index(difference.argmax(), difference.shape)
        found.at = tuple(int(i) + start for i, start in zip(index, shard.box.offset))
    if largest > found.tolerance and rank not in found.ranks:
        found.ranks.append(rank)


def _in_order(found: dict[Key, Difference]) -> list[Difference]:
    """Differences in the order in which a step computes the tensors.

    Forward: activations first to last, then the loss. Backward: last to first, the gradient of a
    module's output before those of its weights.
    """
    # The forward, in the order recorded, and the backward of its modules in reverse.
    forward = [difference for difference in found.values() if difference.kind in (ACTIVATION, LOSS)]
    backward = {difference.name: [] for difference in reversed(forward)}
    for difference in found.values():
        if difference.kind == ACTIVATION_GRADIENT:
            backward[difference.name].append(difference)
    # A parameter belongs to the module whose name is its longest prefix; to the loss if none is.
    for difference in reversed(found.values()):
        if difference.kind == GRADIENT:
            owners = [module for module in backward if difference.name.startswith(module + ".")]
            backward[max(owners, key=len, default=LOSS)].append(difference)
    return [*forward, *itertools.chain(*backward.values())]


def report(comparison: Comparison) -> str:
    """Tables of all differences, by kind, family and layer, each row with its tolerance.

    A `!` marks a difference that exceeds its tolerance.
    """
    expected, loss = comparison.losses
    lines = [f"loss {expected:.6f} in the reference, {loss:.6f} in the chosen layout"]
    for kind in (ACTIVATION, LOSS, ACTIVATION_GRADIENT, GRADIENT):
        rows: dict[str, dict[int | None, Difference]] = {}
        for difference in comparison.differences:
            if difference.kind == kind:
                layer, family = split_name(difference.name)
                rows.setdefault(family, {})[layer] = difference
        # What is outside the layers has a table of its own, the first.
        columns = set().union(*rows.values())
        layers = sorted(columns - {None})
        tables = [[None]] if None in columns else []
        tables += [layers[first : first + COLUMNS] for first in range(0, len(layers), COLUMNS)]
        for shown in tables:
            lines += _table(kind, rows, shown)
    return "\n".join(lines)


def _table(kind: str, rows: dict, columns: list[int | None]) -> list[str]:
    """One table: an empty line, a line of headings, a line for each family with a difference.

    `rows` are the differences of one kind by family and layer, None for what is outside the layers.
    """
    heading = f"{kind:38}{'tolerance':>10}"
    for layer in columns:
        head = "largest" if layer is None else f"layer {layer}"
        heading += f"{head:>9} "
    lines = ["", heading.rstrip()]
    for name, row in rows.items():
        shown = [row[column] for column in columns if column in row]
        if shown:
            strictest = min(difference.tolerance for difference in shown)
            line = f"  {name:36}{strictest:>10.0e}"
            for difference in shown:
                line += f"{difference.largest:>9.0e}{'!' if difference.exceeds else ' '}"
            lines.append(line.rstrip())
    return lines
