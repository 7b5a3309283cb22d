"""The CUDA sources: what nvcc says of them, and that the emulation which runs them elsewhere finds
faults."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels import bare

ROOT = Path(__file__).resolve().parents[2]
NVCC = shutil.which("nvcc")
ARCHITECTURES = ("80", "90", "100")
SOURCES = sorted(bare.CSRC.glob("*.cu"))


@pytest.mark.skipif(not NVCC, reason="needs nvcc")
@pytest.mark.timeout(
    900
)  # half a minute of an idle processor for the largest, much more on a busy one
@pytest.mark.parametrize("source", SOURCES, ids=[path.name for path in SOURCES])
def test_nvcc_compiles_for_all_gpus_without_warning_or_spill(tmp_path, source):
    """All warnings are errors; the report of registers is printed (`pytest -s`)."""
    code = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in ARCHITECTURES]
    strict = ["-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra,-Werror"]
    run = subprocess.run(
        [
            NVCC,
            "-std=c++17",
            "-O3",
            "-c",
            "--threads",
            "2",
            *code,
            *strict,
            "--ptxas-options=-v,-warn-spills,-warn-lmem-usage",
            source,
            "-o",
            tmp_path / "object.o",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-4000:]
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", run.stdout)]
    memory = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", run.stdout
    )
    assert len(registers) == len(memory) >= len(ARCHITECTURES) and set(memory) == {("0", "0", "0")}
    print(
        f"{source.name}: {len(registers)} kernels for sm_{', sm_'.join(ARCHITECTURES)}, "
        f"{min(registers)} to {max(registers)} registers, no spills, no local memory"
    )


BUILD_FOR_CUDA = """
import runpy, torch
torch.version.cuda = VERSION
runpy.run_path("setup.py")
"""
REGISTERED = """
import sys, torch
torch.ops.load_library(sys.argv[1])
print(torch._C._dispatch_has_kernel_for_dispatch_key("megalite::_softmax_forward", "CUDA"))
"""


@pytest.mark.skipif(not NVCC or not shutil.which("g++"), reason="needs nvcc and g++")
@pytest.mark.timeout(900)
def test_setup_builds_the_cuda_part_for_a_cuda_build_of_torch(tmp_path):
    """torch claims to be such a build. The one function that only a real one has, the current
    stream, is put in its place for loading; nothing is run on a GPU."""
    release = re.search(
        r"release ([\d.]+)",
        subprocess.run([NVCC, "--version"], capture_output=True, text=True).stdout,
    )
    code = BUILD_FOR_CUDA.replace("VERSION", repr(release.group(1)))
    run = subprocess.run(
        [
            sys.executable,
            "-c",
            code,
            "build_ext",
            "--build-lib",
            tmp_path,
            "--build-temp",
            tmp_path / "objects",
        ],
        cwd=ROOT,
        env=os.environ | {"MEGALITE_CUDA_ARCHITECTURES": "90"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    library = tmp_path / "megalite" / "kernels" / "native_library.so"
    assert run.returncode == 0 and library.exists(), run.stdout[-3000:]
    stand_in = tmp_path / "stream.so"
    source = (
        'extern "C" int aoti_torch_get_current_cuda_stream(int, void** s) { *s = 0; return 0; }'
    )
    subprocess.run(
        ["g++", "-shared", "-fPIC", "-x", "c++", "-", "-o", stand_in],
        input=source,
        text=True,
        check=True,
    )
    run = subprocess.run(
        [sys.executable, "-c", REGISTERED, library],
        env=os.environ | {"LD_PRELOAD": str(stand_in)},
        capture_output=True,
        text=True,
    )
    assert run.stdout == "True\n", run.stderr


def test_the_sources_know_nothing_of_torch():
    included = {
        line.split()[1].strip('<">')
        for path in [
            *SOURCES,
            bare.CSRC / "cuda.cuh",
            bare.CSRC / "rows.h",
            bare.CSRC / "arguments.h",
        ]
        for line in path.read_text().splitlines()
        if line.startswith("#include")
    }
    ours = {path.name for path in bare.CSRC.iterdir()} | {"emulation.h"}
    assert included - ours <= {"cuda_runtime.h", "cuda_fp16.h", "cuda_bf16.h", "cstdint"}


ONE_KERNEL = """
#include "cuda.cuh"
#include "softmax.h"
using namespace megalite;
struct Forward {
  using Arguments = Softmax;
  template <class L>
  static __device__ void run(const L& g, const Softmax& a, int64_t row) {
        softmax_forward<false, float>(g, a, row); }
};
MEGALITE_EXPORT int megalite_softmax_forward_cuda(const Softmax& a, void*) {
  return launch_blocks<Forward>(a, nullptr);
}
"""
LONG_ROW = """
import ctypes, sys
import numpy as np
from tests.kernels import bare, reference
x = np.random.default_rng(1).standard_normal((1, 1, 2, 3000)).astype(np.float32)
y, _, bound, _ = reference.softmax(x.astype(np.float64), 1.0)
target = bare.Target(ctypes.CDLL(sys.argv[1]), sys.argv[2])
print((abs(target.softmax(x, 1.0)[0] - y) <= bound + 2**-24 * y).all())
"""

FAULTS = {
    "none": ("", "", "True True"),
    "no barrier before partial results are read": (
        "if (lane == 0) shared[warp] = v;\n    __syncthreads();",
        "if (lane == 0) shared[warp] = v;",
        "False",
    ),
    "no barrier before they are overwritten": ("__syncthreads();  // before", "//", "False"),
    "a barrier that not all reach": (
        "if (lane == 0) shared[warp] = v;\n    __syncthreads();",
        "if (lane == 0) { shared[warp] = v; __syncthreads(); }",
        "divergent",
    ),
    "a shuffle that some lanes skip": (
        "v = reduce_warp(v, combine);",
        "if (lane < 20) v = reduce_warp(v, combine);",
        "divergent",
    ),
}


@pytest.mark.skipif(
    not shutil.which("g++") or not bare.CUDA_INCLUDE, reason="needs g++ and CUDA's headers"
)
@pytest.mark.parametrize("fault", FAULTS)
def test_the_emulation_finds_faults(tmp_path, monkeypatch, fault):
    """A row for a whole block, in both orders of threads: right without a fault, else wrong in one,
    or an abort."""
    old, new, expected = FAULTS[fault]
    sources = tmp_path / "csrc"
    shutil.copytree(bare.CSRC, sources, ignore=shutil.ignore_patterns("*.cu", "*.cpp"))
    (sources / "one.cu").write_text(ONE_KERNEL)
    text = (sources / "cuda.cuh").read_text()
    assert old in text
    (sources / "cuda.cuh").write_text(text.replace(old, new, 1))
    monkeypatch.setattr(bare, "CSRC", sources)
    library = bare.build(tmp_path, True, "-O0")
    said = []
    for order in ("cuda", "cuda reversed"):
        run = subprocess.run(
            [sys.executable, "-c", LONG_ROW, library, order],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        said.append((run.stdout + run.stderr).strip())
    assert expected in " ".join(said), said
