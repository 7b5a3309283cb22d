"""Are the numbers of two layouts the same? Compares what `record` wrote for each, against what
rounding explains."""

import re
from dataclasses import dataclass, field
from math import inf, sqrt
from pathlib import Path

import torch

from megalite.nn.config import ModelConfig
from megalite.verify.record import ACTIVATION, ACTIVATION_GRADIENT, GRADIENT, LOSS, Part, read_parts

UNIT_ROUNDOFF = {"fp64": 2.0**-53, "fp32": 2.0**-24, "bf16": 2.0**-8}
COLUMNS = 5
"""Layers beside each other in a table of the report."""


@dataclass(frozen=True)
class Rounding:
    """How far two correct computations may lie apart, relative to the largest entry.

    n roundings in a row, each of relative size u at most and as good as random, add up to about
    sqrt(n) u, and exceed 4 sqrt(n) u with a probability below 1e-3 (Higham and Mary 2019, theorem
    2.4); two computations, twice that. A path goes through 4 products and about 6 other operations
    a layer, forward or backward, one product more at the output layer, and 2 sums in the embedding.
    In fp32 and fp64 each step of a product's sum rounds, over the longest one in the model; in bf16
    products are summed in fp32 and only each operation's result rounds.
    """

    model: ModelConfig
    precision: str
    """fp64, fp32 or bf16."""
    tokens: int
    """In the global batch: what a weight's gradient is summed over."""

    def activation(self, place: str) -> float:
        """Bound for the output of a module, and for the loss: the forward up to there."""
        return self._bound(*self._forward(place))

    def gradient(self, place: str) -> float:
        """Bound for the gradient of a parameter or activation: all of the forward, the backward
        down to there."""
        products, others = self._forward(LOSS)
        layers = self.model.num_layers - self._layers_below(place)
        return self._bound(products + 4 * layers + 1, others + 6 * layers)

    def _forward(self, place: str) -> tuple[int, int]:
        layers = self._layers_below(place) + int(place.startswith("layers."))
        return 4 * layers + int(place == LOSS), 6 * layers + 2

    def _layers_below(self, place: str) -> int:
        layer = re.match(r"layers\.(\d+)\.", place)
        if layer:
            return int(layer[1])
        return 0 if place.startswith("embedding") else self.model.num_layers

    def _bound(self, products: int, others: int) -> float:
        m, u = self.model, UNIT_ROUNDOFF[self.precision]
        longest = (
            1 if self.precision == "bf16" else max(m.vocab_size, m.ffn, m.hidden_size, self.tokens)
        )
        return 2 * 4 * sqrt(products * longest + others) * u


@dataclass
class Difference:
    """How one global tensor of the chosen layout differs from the reference's."""

    kind: str
    place: str
    tolerance: float
    largest: float = 0.0
    """Relative to the largest entry of this tensor in any layer; inf for NaN, or where no rank has
    an element."""
    at: tuple[int, ...] = ()
    """Where in the global tensor."""
    ranks: list[int] = field(default_factory=list)
    """Ranks that are outside the tolerance."""

    @property
    def exceeds(self) -> bool:
        """Whether rounding does not explain it."""
        return not self.largest <= self.tolerance

    def __str__(self) -> str:
        if self.largest == inf and not self.ranks:
            return f"{self.place} ({self.kind}): no rank computes all of it"
        names = ("sample", "position") if self.kind in (ACTIVATION, ACTIVATION_GRADIENT) else ()
        names = ("microbatch",) if self.kind == LOSS else names
        known = (
            " ".join(f"{name} {i}" for name, i in zip(names, self.at)) or f"index {list(self.at)}"
        )
        ranks = ("rank " if len(self.ranks) == 1 else "ranks ") + ", ".join(map(str, self.ranks))
        size = f"difference {self.largest:.0e}, tolerance {self.tolerance:.0e}"
        return f"{self.place} ({self.kind}): {size}" + (
            f"; largest at {known}; {ranks}" if self.ranks else ""
        )


@dataclass(frozen=True)
class Comparison:
    """Every difference, in the order of the computation: forward, then backward."""

    differences: list[Difference]
    losses: tuple[float, float]
    """Of the reference and of the chosen layout."""

    @property
    def first(self) -> Difference | None:
        """The first place that rounding does not explain; None when the numbers are the same."""
        return next((d for d in self.differences if d.exceeds), None)

    @property
    def verdict(self) -> str:
        """One line."""
        if self.first is not None:
            return f"DIFFERENT: first at {self.first}"
        closest = max(self.differences, key=lambda d: d.largest / d.tolerance)
        verdict = (
            f"same numbers: largest difference {closest.largest:.0e} of tolerance "
            f"{closest.tolerance:.0e}, "
            f"at {closest.place} ({closest.kind})"
        )
        widest = max(d.tolerance for d in self.differences)
        if widest > PROVES_LITTLE:
            verdict += (
                f"; but rounding explains up to {widest:.1f} of a tensor here: "
                "add --precision fp64 for a proof"
            )
        return verdict


PROVES_LITTLE = 0.1
"""A tolerance above this share of a tensor's largest entry hides faults."""


def family(place: str) -> str:
    """The name without its layer, whose largest entry differences are measured by."""
    return re.sub(r"^layers\.\d+\.", "", place)


def compare(
    reference: Path, reference_ranks: int, chosen: Path, ranks: int, rounding: Rounding
) -> Comparison:
    """Compare the records of two layouts: every rank of the chosen one, replicas too, with the
    reference's tensors."""
    wanted: dict[tuple[str, str], torch.Tensor] = {}
    for rank in range(reference_ranks):
        for part in read_parts(reference, rank):
            whole = wanted.setdefault(
                (part.kind, part.place), torch.zeros(part.global_shape, dtype=torch.float64)
            )
            whole[_index(part)] = part.values.double()
    scales: dict[tuple[str, str], float] = {}
    for (kind, place), whole in wanted.items():
        key = kind, family(place)
        scales[key] = max(scales.get(key, 0.0), whole.nan_to_num(0.0, 0.0, 0.0).abs().max().item())
    found = {
        key: Difference(
            *key,
            rounding.activation(key[1])
            if key[0] in (ACTIVATION, LOSS)
            else rounding.gradient(key[1]),
        )
        for key in wanted
    }
    seen = {key: torch.zeros(whole.shape, dtype=torch.bool) for key, whole in wanted.items()}
    got_loss = torch.zeros_like(wanted[LOSS, LOSS])
    for rank in range(ranks):
        for part in read_parts(chosen, rank):
            key = part.kind, part.place
            if key not in wanted:
                found[key] = Difference(*key, 0.0, inf, ranks=[rank])
                continue
            seen[key][_index(part)] = True
            _measure(
                found[key],
                part,
                wanted[key][_index(part)],
                scales[part.kind, family(part.place)],
                rank,
            )
            if part.kind == LOSS:
                got_loss[_index(part)] = part.values.double()
    for key, covered in seen.items():
        if not covered.all():
            found[key].largest, found[key].ranks = inf, []
    losses = wanted[LOSS, LOSS].sum().item(), got_loss.sum().item()
    return Comparison(_in_order(found), losses)


def _index(part: Part) -> tuple[slice, ...]:
    return part.box.slices_in(part.box.whole(part.global_shape))


def _measure(found: Difference, part: Part, wanted: torch.Tensor, scale: float, rank: int) -> None:
    """Take a rank's part into account."""
    if not part.box.numel:
        return
    values = part.values.double()
    difference = (values - wanted).abs().nan_to_num(nan=inf) / (scale or 1.0)
    difference[values == wanted] = 0.0  # infinities of one sign are equal
    largest = difference.max().item()
    if largest > found.largest:
        here = torch.unravel_index(difference.argmax(), difference.shape)
        found.largest, found.at = (
            largest,
            tuple(int(i) + start for i, start in zip(here, part.box.offset)),
        )
    if largest > found.tolerance and rank not in found.ranks:
        found.ranks.append(rank)


def _in_order(found: dict[tuple[str, str], Difference]) -> list[Difference]:
    """Activations first to last and the loss, then gradients last to first: of a module's output,
    then its weights."""
    forward = [place for kind, place in found if kind in (ACTIVATION, LOSS)]

    def module_of(parameter: str) -> str:
        return max(
            (place for place in forward if parameter.startswith(place + ".")), key=len, default=LOSS
        )

    weights: dict[str, list[str]] = {}
    for kind, place in found:
        if kind == GRADIENT:
            weights.setdefault(module_of(place), []).append(place)
    ordered = [found[LOSS if place == LOSS else ACTIVATION, place] for place in forward]
    for place in reversed(forward):
        ordered += [found[key] for key in [(ACTIVATION_GRADIENT, place)] if key in found]
        ordered += [found[GRADIENT, name] for name in reversed(weights.get(place, []))]
    return ordered


def report(comparison: Comparison) -> str:
    """Tables of all differences by place and layer, each beside its tolerance; those that exceed it
    are marked `!`."""
    lines = ["loss {:.6f} in the reference, {:.6f} in the chosen layout".format(*comparison.losses)]
    for kind in (ACTIVATION, LOSS, ACTIVATION_GRADIENT, GRADIENT):
        rows: dict[str, dict[int | None, Difference]] = {}
        for difference in comparison.differences:
            if difference.kind == kind:
                layer = re.match(r"layers\.(\d+)\.", difference.place)
                rows.setdefault(family(difference.place), {})[int(layer[1]) if layer else None] = (
                    difference
                )
        lines += _tables(kind, rows)
    return "\n".join(lines)


def _tables(kind: str, rows: dict[str, dict[int | None, Difference]]) -> list[str]:
    """Lines of text: a row for each place, a column for each layer, `COLUMNS` of them at a time."""
    layers = sorted({layer for row in rows.values() for layer in row if layer is not None})
    groups: list[list[int | None]] = [
        layers[i : i + COLUMNS] for i in range(0, len(layers), COLUMNS)
    ]
    lines = []
    for columns in [*([[None]] if any(None in row for row in rows.values()) else []), *groups]:
        heads = ["largest"] if columns == [None] else [f"layer {i}" for i in columns]
        lines += [
            "",
            f"{kind:38}{'tolerance':>10}" + "".join(f"{head:>9} " for head in heads).rstrip(),
        ]
        for place, row in rows.items():
            shown = [row[layer] for layer in columns if layer in row]
            if shown:
                cells = (f"{d.largest:.0e}{'!' if d.exceeds else ' '}" for d in shown)
                tolerance = f"{min(d.tolerance for d in shown):.0e}"
                lines.append(
                    f"  {place:36}{tolerance:>10}"
                    + "".join(f"{cell:>10}" for cell in cells).rstrip()
                )
    return lines
