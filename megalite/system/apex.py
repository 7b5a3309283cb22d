"""Whether NVIDIA's apex is installed. Imports neither apex nor torch."""

from importlib.util import find_spec
from pathlib import Path

INSTALL = (
    "in a checkout of https://github.com/NVIDIA/apex: "
    "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-build-isolation ."
)
"""How to install it: it is on no package index."""
ADAM = "amp_C"
"""The module that FusedAdam's kernels are compiled to."""
NORMS = "fused_layer_norm_cuda"
"""The module that the kernels of FusedLayerNorm and FusedRMSNorm are compiled to."""
SIGNS = ("optimizers/fused_adam.py", "normalization/fused_layer_norm.py")
"""Files of NVIDIA's apex. Its version says nothing: it is always 0.1."""


def why_no_apex(kernels: str) -> str:
    """Why a module of apex's kernels, ADAM or NORMS, cannot be imported; an empty text where it
    can."""
    spec = find_spec("apex")
    if spec is None:
        return "apex is not installed"
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    for folder in folders:
        if all((folder / sign).exists() for sign in SIGNS):
            break
    else:
        where = folders[0] if folders else spec.origin
        return (
            f"the package apex in {where} is not NVIDIA's (PyPI's apex is another project: "
            "pip uninstall apex)"
        )
    if find_spec(kernels) is None:
        return f"NVIDIA's apex in {folder} was installed without its CUDA kernels ({kernels})"
    return ""
