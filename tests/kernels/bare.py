"""The kernels of csrc/ without torch: built by a C++ compiler alone, called by ctypes on NumPy
arrays.

`build(...)` compiles the CPU's sources, or the CUDA sources under emulation.h. A `Target` calls the
kernels of one library: it allocates outputs (filled with what no kernel writes) and returns them as
float64.
"""

import ctypes
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "megalite" / "kernels" / "csrc"


def cuda_include() -> Path | None:
    """The folder of CUDA's headers, if there is one: of CUDA_HOME, beside nvcc, or in the usual
    place."""
    nvcc = shutil.which("nvcc")
    homes = [
        os.environ.get("CUDA_HOME"),
        nvcc and Path(nvcc).resolve().parent.parent,
        "/usr/local/cuda",
    ]
    folders = (Path(home) / "include" for home in homes if home)
    return next((folder for folder in folders if (folder / "cuda_runtime.h").exists()), None)


CUDA_INCLUDE = cuda_include()
CPU_LEVELS = {
    "baseline": set(),
    "avx2": {"avx2", "fma"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
}
"""The builds of the CPU's kernels and the processor flags that each needs."""
TYPES = ("float32", "float16", "bfloat16")


def build(folder: Path, emulated: bool, *flags: str, compiler: str = "g++") -> Path:
    """Compile a shared library of the CPU's kernels or, `emulated`, of the CUDA sources; raises on
    any warning."""
    library = folder / f"{'cuda' if emulated else 'cpu'}{'_'.join(flags).replace('=', '_')}.so"
    sources = sorted(CSRC.glob("*.cu" if emulated else "cpu_*.cpp"))
    language = (
        ["-DMEGALITE_EMULATION", "-isystem", CUDA_INCLUDE, "-I", HERE, "-x", "c++"]
        if emulated
        else []
    )
    warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-psabi"]
    options = ["-std=c++17", "-fPIC", "-shared", *warnings, *flags, *language]
    command = [compiler, *options, *sources, "-o", library]
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert run.returncode == 0, run.stdout[-4000:]
    return library


def cpu_levels() -> list[str]:
    """Which of CPU_LEVELS this processor can run."""
    flags = set(Path("/proc/cpuinfo").read_text().split())
    return [level for level, needed in CPU_LEVELS.items() if needed <= flags]


# The structs of arguments.h


class Shape(ctypes.Structure):
    _fields_ = [("size", ctypes.c_int64 * 3), ("columns", ctypes.c_int64)]


class PerRow(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("stride", ctypes.c_int64 * 3)]


class DropoutStruct(ctypes.Structure):
    _fields_ = [
        ("rows", PerRow),
        ("samples", PerRow),
        ("place", ctypes.c_uint32),
        ("key", ctypes.c_uint32 * 2),
        ("limit", ctypes.c_uint32),
        ("factor", ctypes.c_float),
    ]


def pointers(*names: str) -> list[tuple[str, type]]:
    """The fields that point to arrays."""
    return [(name, ctypes.c_void_p) for name in names]


HEAD = [("shape", Shape), ("type", ctypes.c_int32)]
"""The first fields of every kernel's struct."""


class SoftmaxStruct(ctypes.Structure):
    _fields_ = [
        *HEAD,
        ("causal", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("mask", PerRow),
        ("dropout", DropoutStruct),
        *pointers("x", "grad", "y", "out", "lse"),
    ]


class BiasDropoutAddStruct(ctypes.Structure):
    _fields_ = [*HEAD, ("dropout", DropoutStruct), *pointers("x", "bias", "residual", "out")]


class BiasGeluStruct(ctypes.Structure):
    _fields_ = [*HEAD, *pointers("x", "bias", "grad", "out")]


class SwiGluStruct(ctypes.Structure):
    _fields_ = [*HEAD, *pointers("x", "grad", "out")]


class RmsNormStruct(ctypes.Structure):
    _fields_ = [
        *HEAD,
        ("rows", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("epsilon", ctypes.c_float),
        *pointers("x", "residual", "weight", "grad", "grad_sum"),
        *pointers("out", "sum", "scale", "grad_weight"),
    ]


class RotaryStruct(ctypes.Structure):
    _fields_ = [
        *HEAD,
        ("inverse", ctypes.c_int32),
        ("x", PerRow),
        ("cos", PerRow),
        ("sin", PerRow),
        *pointers("out"),
    ]


class CrossEntropyStruct(ctypes.Structure):
    _fields_ = [
        *HEAD,
        ("valid", ctypes.c_int64),
        *pointers("logits", "labels", "top", "sum", "target", "lse", "grad"),
    ]


class Dropout(NamedTuple):
    """Dropout of a tensor [i, j, k, columns]: rows and samples broadcast to [i, j, k]."""

    rows: np.ndarray
    samples: np.ndarray
    site_id: int
    key: tuple[int, int]
    p: float


def encode(x: np.ndarray, dtype: str) -> np.ndarray:
    """Floats as the kernels read them; bf16 as its bits, rounded to nearest even (no NaN)."""
    if dtype != "bfloat16":
        return np.ascontiguousarray(x, dtype)
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def decode(x: np.ndarray) -> np.ndarray:
    """What `encode` made, as float64."""
    with np.errstate(invalid="ignore"):  # a NaN is a NaN
        if x.dtype == np.uint16:
            x = (x.astype(np.uint32) << 16).view(np.float32)
        return x.astype(np.float64)


def _per_row(values: np.ndarray | None, leading: tuple[int, ...]) -> PerRow:
    if values is None:
        return PerRow()
    view = np.broadcast_to(values, leading)
    return PerRow(
        view.ctypes.data,
        (ctypes.c_int64 * 3)(*(stride // view.itemsize for stride in view.strides[:3])),
    )


def _dropout(dropout: Dropout | None, leading: tuple[int, ...]) -> DropoutStruct:
    if dropout is None:
        return DropoutStruct()
    rows, samples, site_id, key, p = dropout
    numbers = _per_row(rows, leading), _per_row(samples, leading)
    return DropoutStruct(
        *numbers, site_id, (ctypes.c_uint32 * 2)(*key), round(p * 2**32) - 1, 1 / (1 - p)
    )


def _pointer(x: np.ndarray | None) -> int | None:
    return None if x is None else x.ctypes.data


@dataclass
class Target:
    """The kernels of a library: of one CPU level, or CUDA's under emulation with threads in one of
    two orders."""

    library: ctypes.CDLL
    level: str

    def _run(self, kernel: str, struct: ctypes.Structure) -> None:
        if self.level.startswith("cuda"):
            self.library.emulation_reverse(self.level == "cuda reversed")
            assert getattr(self.library, f"megalite_{kernel}_cuda")(ctypes.byref(struct), None) == 0
            return
        rows = int(np.prod(struct.shape.size[:]))
        scratch = np.empty(2 * (struct.shape.columns + 64), np.float32)
        call = getattr(self.library, f"megalite_{kernel}_{self.level}")
        middle = rows // 3  # ranges of rows, as threads have them
        for begin, end in ((0, middle), (middle, rows)):
            call(
                ctypes.byref(struct),
                ctypes.c_int64(begin),
                ctypes.c_int64(end),
                ctypes.c_void_p(scratch.ctypes.data),
            )

    def softmax(
        self, x, scale, mask=None, causal=False, dropout=None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(output, lse) of the forward; x is encoded, [i, j, k, columns]."""
        out, lse = np.full_like(x, 77), np.full(x.shape[:3], 77, np.float32)
        options = (causal, scale, _mask(mask, x), _dropout(dropout, x.shape[:3]))
        arrays = map(_pointer, (x, None, None, out, lse))
        self._run("softmax_forward", SoftmaxStruct(*_head(x), *options, *arrays))
        return decode(out), lse.astype(np.float64)

    def softmax_backward(
        self, grad, scale, y=None, x=None, lse=None, mask=None, causal=False, dropout=None
    ):
        """Gradient of x, from y or from x, lse (float32), mask and dropout."""
        out = np.full_like(grad, 77)
        options = (causal, scale, _mask(mask, grad), _dropout(dropout, grad.shape[:3]))
        arrays = map(_pointer, (x, grad, y, out, lse))
        self._run("softmax_backward", SoftmaxStruct(*_head(grad), *options, *arrays))
        return decode(out)

    def bias_dropout_add(self, x, bias, residual, dropout) -> np.ndarray:
        """residual + dropout(x + bias), all encoded alike."""
        out = np.full_like(x, 77)
        arrays = map(_pointer, (x, bias, residual, out))
        struct = BiasDropoutAddStruct(*_head(x), _dropout(dropout, x.shape[:3]), *arrays)
        self._run("bias_dropout_add", struct)
        return decode(out)

    def bias_gelu(self, x, bias, grad=None) -> np.ndarray:
        """gelu(x + bias), or with `grad` the gradient of its argument: x [rows, columns]."""
        out = np.full_like(x, 77)
        kernel = "bias_gelu_forward" if grad is None else "bias_gelu_backward"
        self._run(kernel, BiasGeluStruct(_rows(x), _type(x), *map(_pointer, (x, bias, grad, out))))
        return decode(out)

    def swiglu(self, x, grad=None) -> np.ndarray:
        """silu(gate) * up of x [rows, 2 f], or with `grad` the gradient of x."""
        out = np.full_like(x[:, ::2] if grad is None else x, 77, order="C")
        shape = Shape((1, 1, x.shape[0]), x.shape[1] // 2)
        kernel = "swiglu_forward" if grad is None else "swiglu_backward"
        self._run(kernel, SwiGluStruct(shape, _type(x), *map(_pointer, (x, grad, out))))
        return decode(out)

    def rms_norm(
        self, x, residual, weight, epsilon: float, group: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(y, s, scale) of x [rows, columns], `group` rows to a lane group."""
        y, s, scale = np.full_like(x, 77), np.full_like(x, 77), np.full(len(x), 77, np.float32)
        shape = Shape((-(-len(x) // group), 1, 1), x.shape[1])
        pointers = map(_pointer, (x, residual, weight, None, None, y, s, scale, None))
        self._run(
            "rms_norm_forward", RmsNormStruct(shape, _type(x), len(x), group, epsilon, *pointers)
        )
        return decode(y), decode(s), scale

    def rms_norm_backward(
        self, s, weight, grad, grad_sum, scale, group: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """(gradient of s, parts of the weight's gradient [groups, columns])."""
        ds, parts = np.full_like(s, 77), np.full((-(-len(s) // group), s.shape[1]), 77, np.float32)
        pointers = map(_pointer, (s, None, weight, grad, grad_sum, ds, None, scale, parts))
        shape = Shape((len(parts), 1, 1), s.shape[1])
        self._run("rms_norm_backward", RmsNormStruct(shape, _type(s), len(s), group, 0, *pointers))
        return decode(ds), parts.astype(np.float64)

    def rotary(self, x, cos, sin, inverse: bool) -> np.ndarray:
        """x [i, j, k, d] of any strides but the last, turned by tables that broadcast to it."""
        out = np.full(x.shape, 77, x.dtype)
        tables = (_per_row(t[..., 0], x.shape[:3]) for t in (x, cos, sin))
        self._run("rotary", RotaryStruct(*_head(x), inverse, *tables, _pointer(out)))
        return decode(out)

    def cross_entropy(self, logits, labels, valid: int) -> np.ndarray:
        """(largest logit, sum of exp, the label's logit), [3, rows]."""
        results = np.full((3, len(logits)), 77, np.float32)
        arrays = map(_pointer, (logits, labels, *results))
        struct = CrossEntropyStruct(_rows(logits), _type(logits), valid, *arrays, None, None)
        self._run("cross_entropy_forward", struct)
        return results.astype(np.float64)

    def cross_entropy_backward(self, logits, labels, valid: int, lse, grad) -> np.ndarray:
        """The gradient of the logits."""
        logits = logits.copy()
        arrays = map(_pointer, (logits, labels, None, None, None, lse, grad))
        struct = CrossEntropyStruct(_rows(logits), _type(logits), valid, *arrays)
        self._run("cross_entropy_backward", struct)
        return decode(logits)


def _head(x: np.ndarray) -> tuple[Shape, int]:
    """Shape and type of an array [i, j, k, columns]."""
    return Shape(x.shape[:3], x.shape[3]), _type(x)


def _rows(x: np.ndarray) -> Shape:
    return Shape((1, 1, x.shape[0]), x.shape[1])


def _type(x: np.ndarray) -> int:
    return {"float32": 0, "float16": 1, "uint16": 2}[x.dtype.name]


def _mask(mask: np.ndarray | None, x: np.ndarray) -> PerRow:
    """A mask [., ., ., columns] of bool, whose last dim is contiguous."""
    if mask is None:
        return PerRow()
    view = np.broadcast_to(mask, x.shape)
    assert mask.shape[-1] == x.shape[-1] and (view.strides[-1] == 1 or x.shape[-1] == 1)
    return PerRow(view.ctypes.data, (ctypes.c_int64 * 3)(*view.strides[:3]))
