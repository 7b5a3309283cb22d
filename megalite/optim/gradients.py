"""The gradient buffer: one flat tensor that gradients accumulate in, are summed over ranks in, and
are clipped in."""

import torch

from megalite.nn.weight_gradient import WeightGradients
from megalite.parallel.collectives import all_reduce
from megalite.parallel.context import ParallelContext


class GradientBuffer:
    """A flat buffer, fp32 (fp64 for fp64 models), of which every parameter's `main_grad` is a view.

    Parameters whose gradients are summed over the same axes lie together, so that one all-reduce of
    a slice sums them.

    Args:
        parameters: of one model, by global name.
        context: of this rank.
    """

    def __init__(self, parameters: dict[str, torch.nn.Parameter], context: ParallelContext):
        self.context = context
        # Partial gradients first: longest set of axes first, otherwise in the order of the model.
        self.parameters = dict(
            sorted(parameters.items(), key=lambda item: -len(item[1].spec.partial))
        )
        dtypes = {parameter.dtype for parameter in parameters.values()}
        dtype = torch.float64 if torch.float64 in dtypes else torch.float32
        total = sum(parameter.numel() for parameter in parameters.values())
        self.flat = torch.zeros(total, dtype=dtype, device=context.device)
        self.weight_gradients = WeightGradients()
        self._partial: dict[tuple[str, ...], slice] = {}
        start = 0
        for parameter in self.parameters.values():
            stop = start + parameter.numel()
            self.weight_gradients.attach(parameter, self.flat[start:stop].view(parameter.shape))
            axes = parameter.spec.partial
            if axes:
                first = self._partial[axes].start if axes in self._partial else start
                self._partial[axes] = slice(first, stop)
            start = stop

    def zero(self) -> None:
        """Forget all gradients, before the first backward of a step."""
        self.flat.zero_()

    def reduce(self) -> None:
        """Sum what ranks hold parts of, after the last backward of a step. Collective over all
        ranks.

        Over the axes that a parameter's gradient is partial over: what each rank computed from its
        part of the sequence. Over first and last stage: the two copies of a tied embedding. Over
        data ranks: everything, in one all-reduce.
        """
        for axes, part in self._partial.items():
            all_reduce(self.flat[part], self.context.group(*axes))
        if self.context.embedding is not None:
            for parameter in self.parameters.values():
                if "pipeline" not in parameter.spec.sharded:
                    all_reduce(parameter.main_grad, self.context.embedding)
        all_reduce(self.flat, self.context.data)

    def norm(self) -> float:
        """Global L2 norm of the whole model's gradient, each parameter counted once; the same on
        every rank."""
        # Every data replica holds the whole sum of the gradients: each computes the norm for
        # itself.
        position = self.context.coordinates | {"data": 0}
        squares = torch.zeros((), dtype=torch.float64, device=self.flat.device)
        for parameter in self.parameters.values():
            if parameter.spec.is_primary(position):
                squares += torch.linalg.vector_norm(parameter.main_grad).double() ** 2
        all_reduce(squares, self.context.tensor)
        all_reduce(squares, self.context.pipeline)
        return squares.sqrt().item()

    def clip(self, norm: float, max_norm: float) -> None:
        """Scale all gradients by min(1, max_norm / (norm + 1e-6)) (Pascanu et al. 2013). max_norm 0
        = off."""
        if max_norm > 0:
            scale = max_norm / (norm + 1e-6)
            if scale < 1:
                self.flat.mul_(scale)
