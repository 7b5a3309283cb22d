"""How weight gradients reach `main_grad`: during the backward, or deferred until after it.

Every gradient of a parameter passes through here, so this is also where its completion is known.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

Product = Callable[[Tensor | None], Tensor | None]
"""Computes the gradient of one use of a weight. Called with a tensor of the weight's shape
(`main_grad`), it adds to that in place, which saves a pass over memory, and its result is not used.
Called with None, where no optimizer collects gradients, it returns the gradient as a new tensor."""


class WeightGradients:
    """Collects the gradients of a model's parameters in their `main_grad`.

    The backwards of linear layers and embeddings add their products themselves (`weight_gradient`),
    which saves a pass over the weights. Whatever else autograd computes is moved by a hook.

    Args:
        on_complete: called with a parameter once in each backward, when `main_grad` holds all that
            this backward contributes: after the last use of a parameter that is used several times,
            and only after its deferred products have run. A parameter that a backward does not
            reach is not reported.
    """

    def __init__(self, on_complete: Callable[[torch.nn.Parameter], None] | None = None):
        self.on_complete = on_complete
        self._deferred: dict[torch.nn.Parameter, list[Product]] | None = None

    def attach(self, parameter: torch.nn.Parameter, main_grad: Tensor) -> None:
        """Collect the gradients of `parameter` in `main_grad`, of its shape."""
        parameter.main_grad = main_grad
        parameter.weight_gradients = self
        # torch calls this hook once a backward, also where every use of the parameter returned no
        # gradient to it.
        parameter.register_post_accumulate_grad_hook(self._finish)

    def add(self, weight: torch.nn.Parameter, product: Product) -> None:
        """Add a product to `weight.main_grad`, or keep it while products are deferred."""
        if self._deferred is None:
            product(weight.main_grad)
        else:
            self._deferred.setdefault(weight, []).append(product)

    @contextmanager
    def deferring(self) -> Iterator[dict[torch.nn.Parameter, list[Product]]]:
        """Run a backward without its weight-gradient products; yields them, for `run_deferred`.

        For zero-bubble schedules (Qi et al. 2023), which send the gradient of the hidden states on
        before they compute those of the weights.
        """
        self._deferred = {}
        try:
            yield self._deferred
        finally:
            self._deferred = None

    @torch.no_grad()
    def run_deferred(self, products: dict[torch.nn.Parameter, list[Product]]) -> None:
        """Add the products that `deferring` kept, in the order of that backward."""
        for weight, kept in products.items():
            for product in kept:
                product(weight.main_grad)
            self._report(weight)

    def _finish(self, parameter: torch.nn.Parameter) -> None:
        # What autograd has computed itself, as of norms and biases.
        if parameter.grad is not None:
            parameter.main_grad.add_(parameter.grad)
            parameter.grad = None
        if self._deferred is None or parameter not in self._deferred:
            self._report(parameter)

    def _report(self, parameter: torch.nn.Parameter) -> None:
        if self.on_complete is not None:
            self.on_complete(parameter)


def weight_gradient(weight: torch.nn.Parameter, product: Product) -> Tensor | None:
    """What the backward of a layer returns to autograd as the gradient of `weight`.

    None where the optimizer collects it in `main_grad`; without an optimizer, the gradient itself.
    """
    gradients: WeightGradients | None = getattr(weight, "weight_gradients", None)
    if gradients is None:
        return product(None)
    gradients.add(weight, product)
    return None
