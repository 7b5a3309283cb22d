"""The gradient buffer: one flat tensor that gradients accumulate in, are summed over ranks in, and are clipped in."""

import torch

from megalite.parallel.collectives import all_reduce
from megalite.parallel.context import ParallelContext


class GradientBuffer:
    """A flat buffer, fp32 (fp64 for fp64 models), of which every parameter's `main_grad` is a view.

    Linear layers add their weight gradients to `main_grad` themselves (see nn.linear); for all others a hook moves what
    autograd produced. Parameters whose gradients are summed over tensor ranks come first, so that one all-reduce of a
    slice does it.
    """

    def __init__(
        self,
        parameters: dict[str, torch.nn.Parameter],
        context: ParallelContext,
        tied: str | None = None,
    ):
        """`tied` names the parameter that first and last stage hold copies of, if there is one."""
        self.context, self.tied = context, tied
        self.parameters = dict(
            sorted(parameters.items(), key=lambda item: not item[1].spec.sequence_partial)
        )
        dtypes = {p.dtype for p in parameters.values()}
        dtype = torch.float64 if torch.float64 in dtypes else torch.float32
        total = sum(p.numel() for p in parameters.values())
        self.flat = torch.zeros(total, dtype=dtype, device=context.device)
        start, self._partial = 0, 0
        for parameter in self.parameters.values():
            parameter.main_grad = self.flat[start : start + parameter.numel()].view(parameter.shape)
            parameter.register_post_accumulate_grad_hook(_move_to_main_grad)
            start += parameter.numel()
            self._partial += parameter.numel() if parameter.spec.sequence_partial else 0

    def zero(self) -> None:
        """Forget all gradients, before the first backward of a step."""
        self.flat.zero_()

    def reduce(self) -> None:
        """Sum what ranks hold parts of, after the last backward of a step. Collective over all ranks.

        Over tensor ranks: gradients that each computed from its part of the sequence. Over first and last stage: the
        two copies of a tied embedding. Over data ranks: everything, in one all-reduce.
        """
        context = self.context
        if self._partial:
            all_reduce(self.flat[: self._partial], context.tensor)
        if self.tied is not None and context.embedding is not None:
            all_reduce(self.parameters[self.tied].main_grad, context.embedding)
        all_reduce(self.flat, context.data)

    def norm(self) -> float:
        """Global L2 norm of the whole model's gradient, each parameter counted once; the same on every rank."""
        me = self.context.tensor.rank
        squares = torch.zeros((), dtype=torch.float64, device=self.flat.device)
        for parameter in self.parameters.values():
            if (parameter.spec.tensor_sharded or me == 0) and not parameter.spec.tied_copy:
                squares += torch.linalg.vector_norm(parameter.main_grad).double() ** 2
        all_reduce(squares, self.context.tensor)
        all_reduce(squares, self.context.pipeline)
        return squares.sqrt().item()

    def clip(self, norm: float, max_norm: float) -> None:
        """Scale all gradients by min(1, max_norm / (norm + 1e-6)) (Pascanu et al. 2013). max_norm 0 = off."""
        if max_norm > 0:
            scale = max_norm / (norm + 1e-6)
            if scale < 1:
                self.flat.mul_(scale)


def _move_to_main_grad(parameter: torch.nn.Parameter) -> None:
    if parameter.grad is not None:  # None: the layer has added it to main_grad itself
        parameter.main_grad.add_(parameter.grad)
        parameter.grad = None
