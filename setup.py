"""Builds megalite's native kernels beside the Python package where that is possible; metadata is in
pyproject.toml.

The kernels are optional: without a C++ compiler or without torch in the build environment (pip's
build isolation), and when compiling fails, the package is built without them and says so. `python
-m megalite.kernels` tells what there is.

The CUDA part needs nvcc of the same major version as a CUDA build of torch.
MEGALITE_CUDA_ARCHITECTURES names the GPUs, those of "80;90;100" that nvcc knows unless set; the
last one's PTX serves later ones.
"""

import copy
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

if sys.version_info < (3, 10):
    sys.exit(f"megalite needs Python 3.10 or newer, this is Python {sys.version.split()[0]}")

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCES = Path("megalite/kernels/csrc")
OLDEST_TORCH = "0x020a000000000000"
"""The stable ABI of torch 2.10: the library works with it and later ones."""
# No -ffast-math: it breaks inf and NaN, and changes the rounding of the whole process.
COMPILE = [
    "-std=c++17",
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-g0",
]


def torch_build() -> tuple[list[str], Path, str | None] | None:
    """(include folders, library folder, CUDA version or None) of the torch of this environment, if
    there is one."""
    try:
        import torch
        from torch.utils.cpp_extension import include_paths
    except (ImportError, OSError):  # OSError: a library that torch loads is missing
        return None
    return include_paths(), Path(torch.__file__).parent / "lib", torch.version.cuda


def cuda_compiler(version: str | None) -> tuple[str, Path] | None:
    """(nvcc, the folder of its libraries) for that major version of CUDA: of CUDA_HOME, or in the
    PATH."""
    home = os.environ.get("CUDA_HOME")
    nvcc = (home and shutil.which("nvcc", path=f"{home}/bin")) or shutil.which("nvcc")
    if not version or nvcc is None:
        return None
    version_text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    if f"release {version.split('.')[0]}." not in version_text:
        return None
    # nvcc may be a link or a script; it reports its own folder.
    plan = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True).stderr
    return nvcc, Path(re.search(r"^#\$ TOP=(.*)$", plan, re.M).group(1)) / "lib64"


def cuda_flags(nvcc: str) -> list[str]:
    """nvcc's flags for the GPUs asked for."""
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    usual = ";".join(name for name in ("80", "90", "100") if f"sm_{name}" in known)
    names = os.environ.get("MEGALITE_CUDA_ARCHITECTURES", usual).split(";")
    code = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in names]
    return [
        "-std=c++17",
        "-O3",
        *code,
        f"-gencode=arch=compute_{names[-1]},code=compute_{names[-1]}",
    ]


def say(text: str) -> None:
    """Print to stderr, also under -q."""
    print(f"megalite is built without {text}", file=sys.stderr, flush=True)


class BuildKernels(build_ext):
    """build_ext that compiles CUDA sources too, names one file for all Pythons, and may fail."""

    def run(self):
        """Build, or say why that failed."""
        try:
            super().run()
        except Exception as problem:
            self.give_up(problem)
        if self.inplace and not self.distribution.ext_modules:  # an older build is of other sources
            (SOURCES.parent / "native_library.so").unlink(missing_ok=True)

    def give_up(self, problem):
        """Say why, and build a package of Python only."""
        say(f"native kernels: {problem}")
        self.distribution.ext_modules = None

    def build_extension(self, extension):
        """Compile the .cu sources to objects, then leave the rest to setuptools; without them where
        that fails."""
        try:
            found = cuda_compiler(extension.cuda)
            if found:
                with_cuda = copy.deepcopy(extension)
                self.add_cuda(with_cuda, *found)
                return super().build_extension(with_cuda)
        except Exception as problem:  # nvcc's, or the linker's: it may not find CUDA's libraries
            say(f"its CUDA part: {problem}")
        try:
            super().build_extension(extension)
        except Exception as problem:
            self.give_up(problem)

    def add_cuda(self, extension, nvcc, libraries):
        """Add the CUDA part; raises when nvcc fails."""
        objects = []
        for source in sorted(SOURCES.glob("*.cu")):
            target = Path(self.build_temp, source.stem + ".cuda.o")
            target.parent.mkdir(parents=True, exist_ok=True)
            self.spawn(
                [nvcc, "-c", *cuda_flags(nvcc), "-Xcompiler=-fPIC", str(source), "-o", str(target)]
            )
            objects.append(str(target))
        extension.extra_objects += objects
        extension.define_macros += [("MEGALITE_CUDA", None), ("USE_CUDA", None)]
        extension.library_dirs.append(str(libraries))
        extension.libraries += ["cudart_static", "dl", "rt", "pthread"]

    def get_ext_filename(self, name):
        """A name without the Python version: the library does not use Python."""
        return os.path.join(*name.split(".")) + ".so"

    def get_export_symbols(self, extension):
        """None: there is no PyInit, torch loads the library."""
        return []


class Wheel(bdist_wheel):
    """bdist_wheel that looks after building, not before, whether the wheel is for one platform or
    for any."""

    def run(self):
        """Build, then make the wheel of what there is."""
        self.run_command("build")
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()


def kernels() -> list[Extension]:
    """The native library, if torch is there to compile against."""
    build = torch_build()
    if build is None:
        say(
            "native kernels: there is no torch in the environment of the build "
            "(pip's --no-build-isolation gives it)"
        )
        return []
    include, library, cuda = build
    extension = Extension(
        "megalite.kernels.native_library",
        [str(path) for path in sorted(SOURCES.glob("*.cpp"))],
        depends=[str(path) for path in sorted(SOURCES.iterdir())],
        include_dirs=include,
        library_dirs=[str(library)],
        libraries=[
            name
            for name in ("torch", "torch_cpu", "torch_cuda")
            if (library / f"lib{name}.so").exists()
        ],
        define_macros=[("TORCH_TARGET_VERSION", OLDEST_TORCH)],
        extra_compile_args=COMPILE,
        optional=True,
    )
    extension.cuda = cuda
    return [extension]


setup(
    ext_modules=kernels(),
    cmdclass={"bdist_wheel": Wheel, "build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
