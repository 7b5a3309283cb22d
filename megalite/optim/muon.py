"""Muon (Jordan et al. 2024): momentum whose matrices are orthogonalized before they are applied.

A matrix is orthogonalized as a whole, wherever its parts lie, so the update is the same in every
layout. Letters: a matrix [m, n] has m outputs and n inputs.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from megalite.nn.parameter import held_boxes
from megalite.optim.gradients import GradientBuffer
from megalite.parallel.boxes import Box
from megalite.parallel.collectives import all_to_all, gather_objects

COEFFICIENTS = {
    "simple": ((3.4445, -4.7750, 2.0315),),
    "quintic": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
}
"""(a, b, c) of successive iterations of `orthogonalize`; the last is repeated. simple is that of
Jordan et al. 2024, quintic Megatron-LM's default."""
TINY = 1e-7
"""Added to a norm that is divided by: a matrix of zeros stays zero."""
SCALES: dict[str, Callable[[int, int], float]] = {
    "spectral": lambda m, n: max(m, n) ** 0.5,
    "unit_rms_norm": lambda m, n: (m / n) ** 0.5,
    "shape_scaling": lambda m, n: max(1.0, m / n) ** 0.5,
}
"""What an orthogonalized matrix [m, n] is multiplied by. spectral: Liu et al. 2025, equation 4,
without their 0.2; unit_rms_norm: Bernstein and Newhouse 2024; shape_scaling: Jordan et al. 2024."""


def orthogonalize(matrix: Tensor, kind: str = "quintic", steps: int = 5) -> Tensor:
    """About U V^T of a matrix [m, n] with singular value decomposition U S V^T, by Newton-Schulz
    iterations in the matrix's dtype.

    X = matrix / ||matrix||, then `steps` times X = a X + (b A + c A^2) X with A = X X^T and the
    coefficients of `kind`. Singular values end between about 0.7 and 1.2.
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.t()
    x = wide / (torch.linalg.vector_norm(wide) + TINY)
    coefficients = COEFFICIENTS[kind]
    for i in range(steps):
        a, b, c = coefficients[min(i, len(coefficients) - 1)]
        square = x @ x.t()
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x if wide is matrix else x.t()


def matrices_in(weight: Tensor) -> list[Tensor]:
    """The matrices [..., n] that a fused weight is made of, as views of it.

    Of [groups, q + 2, d, h], the queries, keys and values of all heads; of [2, f, h], gate and up;
    a weight of two dims is one matrix.
    """
    if weight.dim() == 4:
        return [weight[:, :-2], weight[:, -2], weight[:, -1]]
    if weight.dim() == 3:
        return list(weight)
    return [weight]


class WholeMatrices:
    """Brings each matrix to one rank as a whole, and what that rank makes of it back to the ranks
    that update parts of it.

    The ranks that share the parameters of a stage take turns: of every `size` parameters each rank
    gets one. A rank sends and receives each element that it updates once. Collective over these
    ranks: the tensor-parallel ranks, with a sharded buffer also over the data ranks.

    Args:
        gradients: the buffer that the parameters belong to.
        names: of parameters of this stage, the same on every rank of the group. None of their
            elements is held twice in the group.
    """

    def __init__(self, gradients: GradientBuffer, names: list[str]):
        axes = ("tensor", "data") if gradients.sharded else ("tensor",)
        self.group = gradients.context.group(*axes)
        self.nothing = gradients.flat.new_empty(0)
        """Elements of which there are none."""
        self.shapes = {name: gradients.parameters[name].spec.global_shape for name in names}
        # The boxes of each name that a rank holds, in the order of its flattened elements.
        held: dict[str, list[Box]] = {}
        for name in names:
            parameter = gradients.parameters[name]
            elements = gradients.ranges.get(name, (0, 0))
            part = gradients.flat.new_empty(elements[1] - elements[0], device="meta")
            held[name] = [box for box, _ in held_boxes(parameter, part, elements)]
        self.boxes: list[dict[str, list[Box]]] = gather_objects(held, self.group)
        # Parameters of similar size go together: they take about as long.
        self.order = sorted(names, key=lambda name: -torch.Size(self.shapes[name]).numel())

    def apply(
        self,
        part: Callable[[str], Tensor],
        change: Callable[[Tensor], None],
        use: Callable[[str, Tensor], None],
    ) -> None:
        """Change every parameter as a whole. Collective.

        Args:
            part: gives this rank's elements of a parameter, flat, before the change.
            change: called with a whole parameter on one rank, changes it in place.
            use: called on every rank with the name of each parameter and this rank's elements of
                it, flat, after the change.
        """
        rank = self.group.rank
        size = self.group.size
        for first in range(0, len(self.order), size):
            # The i-th rank gets the i-th of these. Past the end there is nothing to send.
            names = self.order[first : first + size]
            turns = [*names, *[None] * (size - len(names))]
            sent = [self.nothing if name is None else part(name) for name in turns]
            expected = [self._numel(other, turns[rank]) for other in range(size)]
            parts = all_to_all(sent, expected, self.group)
            if turns[rank] is not None:
                parts = self._changed(turns[rank], parts, change)
            sizes = [self._numel(rank, name) for name in turns]
            for name, changed in zip(names, all_to_all(parts, sizes, self.group)):
                use(name, changed)

    def _numel(self, rank: int, name: str | None) -> int:
        """Elements that a rank holds of a parameter; 0 of None."""
        return sum(box.numel for box in self.boxes[rank].get(name, ()))

    def _changed(self, name: str, parts: list[Tensor], change: Callable) -> list[Tensor]:
        """The ranks' parts of a parameter after its change."""
        whole = parts[0].new_empty(self.shapes[name])
        views = [self._views(whole, rank, name) for rank in range(self.group.size)]
        for boxes, part in zip(views, parts):
            for view, values in zip(boxes, part.split([view.numel() for view in boxes])):
                view.copy_(values.view(view.shape))
        change(whole)
        flat = [[self.nothing, *(view.reshape(-1) for view in boxes)] for boxes in views]
        return [torch.cat(pieces) for pieces in flat]

    def _views(self, whole: Tensor, rank: int, name: str) -> list[Tensor]:
        outer = Box.whole(self.shapes[name])
        return [whole[box.slices_in(outer)] for box in self.boxes[rank][name]]


class Muon(torch.optim.Optimizer):
    """Updates matrices of a model, which may be spread over ranks.

    With gradient g and momentum M: M = mu M + g; d = M, or g + mu M with `nesterov`; every matrix
    of d is orthogonalized and multiplied by its scale, giving u; w = (1 - lr wd) w - lr u. M is
    kept as `momentum_buffer`. A step is collective over the ranks of `matrices`.

    Args:
        groups: torch's parameter groups, with the `names` of their weights; the elements of a
            weight that this rank updates, in its shape or flat.
        matrices: of these names, on every rank.
        lr: learning rate, of groups that have none of their own.
        momentum: mu.
        nesterov: whether the gradient is added once more.
        coefficients: a key of COEFFICIENTS.
        steps: Newton-Schulz iterations.
        scale: of a matrix [m, n].
    """

    def __init__(
        self,
        groups: list[dict],
        matrices: WholeMatrices,
        lr: float,
        *,
        momentum: float,
        nesterov: bool,
        coefficients: str,
        steps: int,
        scale: Callable[[int, int], float],
    ):
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": 0.0})
        self.matrices = matrices
        self.nesterov = nesterov
        self.coefficients = coefficients
        self.steps = steps
        self.scale = scale

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Update the weights. A closure is not called."""
        updated = {}
        for group in self.param_groups:
            for name, weight in zip(group["names"], group["params"]):
                state = self.state[weight]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                state["momentum_buffer"].mul_(group["momentum"]).add_(weight.grad)
                updated[name] = (weight, group)

        def direction(name: str) -> Tensor:
            if name not in updated:
                return self.matrices.nothing
            weight, group = updated[name]
            buffer = self.state[weight]["momentum_buffer"]
            if self.nesterov:
                buffer = weight.grad.add(buffer, alpha=group["momentum"])
            return buffer.reshape(-1)

        def update(name: str, orthogonalized: Tensor) -> None:
            if name in updated:
                weight, group = updated[name]
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(orthogonalized.view(weight.shape), alpha=-group["lr"])

        self.matrices.apply(direction, self._orthogonalize, update)

    def _orthogonalize(self, weight: Tensor) -> None:
        """In place, each of its matrices."""
        for view in matrices_in(weight):
            matrix = view.reshape(-1, view.shape[-1])
            update = orthogonalize(matrix, self.coefficients, self.steps)
            view.copy_(update.mul_(self.scale(*matrix.shape)).view(view.shape))
