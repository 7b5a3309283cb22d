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
from torch.autograd import forward_ad

from megalite.kernels.philox import MASK

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
        return (
            "they were not built: `pip install --no-build-isolation` with a C++ compiler "
            "(docs/kernels.md)"
        )
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as problem:
        return f"{LIBRARY.name} cannot be loaded, build it again: {problem.__cause__ or problem}"
    return None


MISSING = _load()
"""Why there are no native kernels, or None when there are."""


def _has(device: str) -> bool:
    """Whether the library has kernels for this type of device."""
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device)
    return (
        MISSING is None
        and key is not None
        and torch._C._dispatch_has_kernel_for_dispatch_key("megalite::_softmax_forward", key)
    )


DEVICES = tuple(device for device in ("cpu", "cuda") if _has(device))
"""Types of devices that have native kernels."""


def operator(name: str, mutates: tuple[str, ...] = ()) -> Callable:
    """Decorates a function that becomes the operator megalite::name.

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

        return torch.library.custom_op(f"megalite::{name}", checked, mutates_args=mutates)

    return define


def takes(x: torch.Tensor) -> bool:
    """Whether the native kernels take tensors of this device and dtype."""
    return x.device.type in DEVICES and x.dtype in DTYPES


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """A tensor [..., columns] as the kernels see it, contiguous [i, j, k, columns]."""
    x = x.contiguous()
    leading = x.shape[:-1]
    if len(leading) > 3:
        return x.view(1, 1, -1, x.shape[-1])
    return x.view(*[1] * (3 - len(leading)), *leading, -1)


def row_numbers(numbers: torch.Tensor, leading: torch.Size) -> torch.Tensor:
    """Row or sample numbers, broadcast to the leading dims of a tensor: a view [i, j, k] where
    there are up to 3."""
    numbers = numbers.expand(leading)
    if len(leading) > 3:
        return numbers.reshape(1, 1, -1)
    return numbers.view(*[1] * (3 - len(leading)), *leading)


def dropout_arguments(site_id: int, key0: int, key1: int, p: float) -> dict[str, int | float]:
    """The kernels' arguments for dropout: where and under which key, the largest 32-bit word that
    is dropped, and the factor 1 / (1 - p) of what is kept."""
    return dict(
        place=site_id,
        key0=key0 & MASK,
        key1=key1 & MASK,
        limit=round(p * 2**32) - 1,
        factor=1 / (1 - p),
    )


def report() -> list[str]:
    """Lines that say which kernels are available, and why others are missing."""
    if MISSING:
        return [
            f"native kernels: none, {MISSING}",
            "everything runs by compositions of PyTorch operations",
        ]
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
