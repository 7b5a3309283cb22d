"""The parameter buffer of a sharded optimizer: data ranks update their shards of it, and gather
those of the others."""

from collections.abc import Iterable

import torch

from megalite.optim.gradients import GradientBuffer
from megalite.parallel.collectives import gather_shards


class ParameterBuffer:
    """A flat buffer that a model's parameters become views of, laid out like its gradients.

    Args:
        gradients: the sharded gradient buffer of the same parameters.
    """

    def __init__(self, gradients: GradientBuffer):
        self._group = gradients.context.data
        self._layout = gradients.layout
        parameters = gradients.parameters
        (dtype,) = {parameter.dtype for parameter in parameters.values()}
        self.flat = torch.zeros(self._layout.total, dtype=dtype, device=gradients.flat.device)
        for name, parameter in parameters.items():
            view = gradients.view(name, self.flat)
            view.copy_(parameter.detach())
            parameter.data = view
        self._gathering: dict[int, object] = {}
        """Handles by bucket."""

    def start_gathering(self) -> None:
        """Gather every rank's shards, in the order in which a forward needs them. Collective over
        the data ranks.

        A parameter may be read after `wait`.
        """
        for index, bucket in reversed(list(enumerate(self._layout.buckets))):
            values = self.flat[bucket.start : bucket.stop]
            self._gathering[index] = gather_shards(values, self._group)

    def wait(self, names: Iterable[str] | None = None) -> None:
        """Block until these parameters have arrived; None: all."""
        buckets = list(self._gathering)
        if names is not None:
            wanted = {self._layout.bucket_of[name] for name in names}
            buckets = sorted(wanted & self._gathering.keys())
        for index in buckets:
            self._gathering.pop(index).wait()
