"""The native kernels: loaded here if they were built, never built here.

Each operator of this package has one definition in Python, and two bodies: a composition of PyTorch
operations, which is the reference and runs everywhere, and a kernel in csrc/. `takes` says which
one runs.
"""

import os
from collections.abc import Callable
from functools import wraps
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd import forward_ad

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LIBRARY = Path(__file__).with_name("native_library.so")
SWITCH = "MEGALITE_KERNELS"
"""The environment variable that turns the native kernels off."""
OFF = ("off", "0", "false", "no")


def _load() -> str | None:
    """Load the library. Returns why there is none, or None when it is loaded.

    Raises ValueError for an unknown value of the switch.
    """
    switch = os.environ.get(SWITCH, "")
    if switch.lower() in OFF:
        return f"{SWITCH}={switch} turns them off"
    if switch:
        raise ValueError(
            f"{SWITCH} is {switch!r}: {', '.join(OFF)} turn the native kernels off, "
            "unset leaves them on"
        )
    if not LIBRARY.exists():
        remedy = "`pip install --no-build-isolation` with a C++ compiler (docs/kernels.md)"
        return f"they were not built: {remedy}"
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as problem:
        return f"{LIBRARY.name} cannot be loaded, build it again: {problem.__cause__ or problem}"
    return None


MISSING = _load()
"""Why there are no native kernels, or None when there are."""


def _has(device: str) -> bool:
    """Whether the library has kernels for this type of device."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return MISSING is None and has("megalite::_softmax_forward", device.upper())


DEVICES = tuple(filter(_has, ("cpu", "cuda")))
"""Types of devices that have native kernels."""


def empty_like(x: Tensor, *rest) -> Tensor:
    """An empty contiguous tensor of x's shape, dtype and device; `rest` is ignored."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def operator(name: str, fake: Callable = empty_like, mutates: tuple[str, ...] = ()) -> Callable:
    """Decorates a function that becomes the operator megalite::name.

    `fake` takes the operator's arguments and makes empty outputs, for tensors without data (as in
    torch.compile); by default, one like the first argument.

    The operator raises NotImplementedError in forward-mode differentiation, which no operator here
    supports: torch itself would return tangents of zero without an error.
    """

    def define(body: Callable):
        @wraps(body)
        def checked(*args, **kwargs):
            if forward_ad._current_level >= 0:
                raise NotImplementedError(
                    f"megalite::{name} has no forward-mode derivative (jvp, dual tensors)"
                )
            return body(*args, **kwargs)

        defined = torch.library.custom_op(f"megalite::{name}", checked, mutates_args=mutates)
        defined.register_fake(fake)
        return defined

    return define


def check_floating(name: str, x: Tensor, shape: str, dims: int = 1) -> None:
    """Raise TypeError unless x is floating-point with at least `dims` dims: `shape`, in words."""
    if x.dim() < dims or not x.is_floating_point():
        raise TypeError(
            f"{name} takes floating-point tensors {shape}, not {x.dtype} {tuple(x.shape)}"
        )


def check_alike(name: str, other: Tensor, x: Tensor) -> None:
    """Raise TypeError unless an operand has x's dtype and device."""
    if other.dtype != x.dtype or other.device != x.device:
        raise TypeError(f"{name} is {other.dtype} on {other.device}, x is {x.dtype} on {x.device}")


def check_operand(name: str, other: Tensor | None, shape: torch.Size, x: Tensor) -> None:
    """Raise ValueError unless an operand beside x, if there is one, has this shape; TypeError
    unless it has x's dtype and device."""
    if other is None:
        return
    if other.shape != shape:
        raise ValueError(f"{name} is {tuple(other.shape)}, not {tuple(shape)}")
    check_alike(name, other, x)


def broadcasts(shape: torch.Size, target: torch.Size) -> bool:
    """Whether a tensor of one shape expands to the other."""
    fits = zip(shape[::-1], target[::-1])
    return len(shape) <= len(target) and all(n in (1, size) for n, size in fits)


def sums_dtype(x: Tensor) -> torch.dtype:
    """What sums over x are computed in: fp64 for fp64, otherwise fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def takes(x: Tensor) -> bool:
    """Whether the native kernels take tensors of this device and dtype."""
    return x.device.type in DEVICES and x.dtype in DTYPES


def contiguous(x: Tensor | None) -> Tensor | None:
    """x in contiguous memory; None for None, an operand that is left out."""
    return None if x is None else x.contiguous()


def as_rows(x: Tensor | None) -> Tensor | None:
    """A tensor [..., columns] as the kernels see it, contiguous [i, j, k, columns], or None."""
    if x is None:
        return None
    x = x.contiguous()
    leading = x.shape[:-1]
    if len(leading) > 3:
        return x.view(1, 1, -1, x.shape[-1])
    return x.view(*[1] * (3 - len(leading)), *leading, -1)


def report() -> list[str]:
    """Lines that say which kernels are available, and why others are missing."""
    if MISSING:
        instead = "everything runs by compositions of PyTorch operations"
        return [f"native kernels: none, {MISSING}", instead]
    lanes = torch.ops.megalite._cpu_lanes()
    name = {16: "AVX-512", 8: "AVX2"}.get(lanes, "any processor")
    lines = [f"CPU:  native, {lanes} lanes ({name}), {torch.get_num_threads()} thread(s)"]
    if "cuda" in DEVICES:
        found = "GPU found" if torch.cuda.is_available() else "but no GPU is there"
        return [*lines, f"CUDA: native, {found}"]
    why = "nvcc of its CUDA version was not there when megalite was built"
    if torch.version.cuda is None:
        why = f"torch {torch.__version__} is not a CUDA build"
    return [*lines, f"CUDA: compositions of PyTorch operations; {why}"]


def status() -> str:
    """One line about the kernels, printed at the start of a run and compared between ranks."""
    if MISSING:
        return f"kernels: PyTorch compositions, no native ones: {MISSING}"
    return f"kernels: native on {' and '.join(DEVICES)}"
