"""Norms of gradients and weights, and zeros in gradients, of the whole model or by layer."""

from collections.abc import Callable, Iterator

import torch

from megalite.nn.parameter import held_boxes
from megalite.optim.config import OptimizerConfig
from megalite.optim.gradients import GradientBuffer
from megalite.parallel.collectives import all_reduce, gather_objects

Held = Iterator[tuple[str, torch.Tensor]]
"""(parameter name, values) of what this rank holds, without vocabulary padding."""


class Statistics:
    """What --log-params-norm, --log-num-zeros-in-grad and --log-norms-per-layer ask for.

    Each element of the model counts once, so the numbers are those of one rank in every layout. A
    layer is `layers.0`, or the first part of the name of another parameter, such as `embedding`.
    Creating this is collective.
    """

    def __init__(self, gradients: GradientBuffer, config: OptimizerConfig):
        self.gradients = gradients
        self.config = config
        self.layers: list[str] = []
        if self.is_wanted:
            # All stages sum in the same order.
            names = gather_objects(list(gradients.parameters), gradients.context.control)
            every = dict.fromkeys(_layer(name) for stage in names for name in stage)
            self.layers = list(every)

    @property
    def is_wanted(self) -> bool:
        """Whether any of the flags is given."""
        c = self.config
        return c.log_params_norm or c.log_num_zeros_in_grad or c.log_norms_per_layer

    def of_gradients(self, scale: float) -> dict[str, float]:
        """Numbers about the summed gradients, before clipping, by the names of the metrics file.

        Collective. scale: of the loss, which the gradients still contain.
        """
        found = {}
        if self.config.log_num_zeros_in_grad:
            zeros = self._sums(self._held_gradients(), lambda values: (values == 0).sum())
            found["zeros_in_grad"] = int(sum(zeros.values()))
        if self.config.log_norms_per_layer:
            for layer, squares in self._sums(self._held_gradients(), _squares).items():
                found[f"grad_norm/{layer}"] = squares**0.5 / scale
        return found

    def of_parameters(self) -> dict[str, float]:
        """Numbers about the weights, by the names of the metrics file. Collective."""
        found = {}
        c = self.config
        if not (c.log_params_norm or c.log_norms_per_layer):
            return found
        sums = self._sums(self._held_parameters(), _squares)
        if c.log_params_norm:
            found["params_norm"] = sum(sums.values()) ** 0.5
        if c.log_norms_per_layer:
            for layer, squares in sums.items():
                found[f"params_norm/{layer}"] = squares**0.5
        return found

    def _held_gradients(self) -> Held:
        for name, _, values in self.gradients.held():
            yield name, values

    def _held_parameters(self) -> Held:
        gradients = self.gradients
        for name, elements in gradients.ranges.items():
            parameter = gradients.parameters[name]
            weight = gradients.updated_part(name, parameter.detach())
            for _, values in held_boxes(parameter, weight, elements):
                yield name, values

    def _sums(self, held: Held, measure: Callable) -> dict[str, float]:
        """The sum of `measure(values)` over the whole model, by layer."""
        gradients = self.gradients
        index = {layer: i for i, layer in enumerate(self.layers)}
        device = gradients.flat.device
        totals = torch.zeros(len(index), dtype=torch.float64, device=device)
        counted = set(gradients.counted)
        for name, values in held:
            if name in counted:
                totals[index[_layer(name)]] += measure(values)
        all_reduce(totals, gradients.context.world)
        return dict(zip(self.layers, totals.tolist()))


def _squares(values: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(values, dtype=torch.float64) ** 2


def _layer(name: str) -> str:
    """The layer of a parameter: `layers.3` of `layers.3.mlp.up.weight`."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] == "layers" else parts[0]
