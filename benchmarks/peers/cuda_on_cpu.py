"""Megatron-core on a machine without a GPU: CPU tensors and gloo.

Megatron-core asks `torch.cuda` for devices, streams and generators, and writes `device="cuda"` in
many places. `install` answers each with its CPU counterpart. Only functions that make or move
tensors are wrapped, so the arithmetic is the peer's own. Written for megatron-core 0.19.2 and torch
2.13.
"""

import contextlib
import functools

import torch
from no_triton import Inert, without_triton

CPU = torch.device("cpu")
FACTORIES = (
    "tensor as_tensor zeros ones empty full rand randn randint arange eye linspace "
    "zeros_like ones_like empty_like full_like rand_like randn_like"
).split()


class Stream:
    """A stream of a device that has only one: nothing needs to wait."""

    def __init__(self, *args, **kwargs):
        pass

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


class Generators:
    """torch.cuda.default_generators: the CPU's generator under every index."""

    def __getitem__(self, index):
        return torch.default_generator


def install() -> None:
    """Prepare torch. Call it before anything of Megatron-core is imported."""
    without_triton()
    _tensors()
    _cuda()


def _is_cuda(device) -> bool:
    if isinstance(device, int):
        return not isinstance(device, bool)
    return device is not None and torch.device(device).type == "cuda"


def _tensors() -> None:
    def on_cpu(function):
        @functools.wraps(function)
        def made_on_cpu(*args, **kwargs):
            if _is_cuda(kwargs.get("device")):
                kwargs["device"] = CPU
            return function(*args, **kwargs)

        return made_on_cpu

    for name in FACTORIES:
        setattr(torch, name, on_cpu(getattr(torch, name)))
    to = on_cpu(torch.Tensor.to)
    kind = torch.Tensor.type

    def tensor_to(self, *args, **kwargs):
        if args and isinstance(args[0], (str, torch.device)) and _is_cuda(args[0]):
            args = (CPU, *args[1:])
        return to(self, *args, **kwargs)

    def tensor_type(self, dtype=None, *args, **kwargs):
        # The optimizers sort parameters by the names of CUDA's types.
        if dtype is None:
            return kind(self).replace("torch.", "torch.cuda.", 1)
        return kind(self, dtype, *args, **kwargs)

    torch.Tensor.to = tensor_to
    torch.Tensor.type = tensor_type
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self


def _cuda() -> None:
    # Each name gets a function of its own: torch.compile refuses one under two names.
    def answer(module, names: str, value) -> None:
        for name in names.split():
            setattr(module, name, lambda *args, **kwargs: value())

    def no_device(*args, **kwargs):
        raise AssertionError("there is no CUDA device")  # what torch expects of a CPU build

    cuda = torch.cuda
    cuda.get_device_properties = no_device
    cuda.Stream = cuda.Event = Stream
    cuda.nvtx = Inert("nvtx")
    cuda.default_generators = Generators()
    cuda._lazy_call = lambda call, **kwargs: call()
    answer(cuda, "current_device", lambda: CPU)
    answer(cuda, "device_count", lambda: 1)
    answer(cuda, "current_stream default_stream", Stream)
    answer(cuda, "stream", contextlib.nullcontext)
    answer(cuda, "is_current_stream_capturing", lambda: False)
    answer(cuda, "get_device_capability", lambda: (0, 0))
    answer(cuda, "memory_stats", dict)
    answer(cuda, "memory_allocated memory_reserved", int)
    answer(cuda, "max_memory_allocated max_memory_reserved", int)
    answer(cuda, "synchronize empty_cache set_device set_stream", lambda: None)
    answer(cuda, "_lazy_init reset_peak_memory_stats", lambda: None)
    for module in (cuda, cuda.random):
        answer(module, "get_rng_state", torch.get_rng_state)
        module.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
        module.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)
        module.manual_seed_all = lambda seed: torch.default_generator.manual_seed(seed)
