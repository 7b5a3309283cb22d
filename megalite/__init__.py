"""Megatron-style data, tensor and pipeline parallel training of large language models.

A program of your own needs the names of `__all__` (docs/library.md). Each is imported on first use,
so `import megalite` does not load torch.
"""

import importlib

__version__ = "0.1.0"

_HOMES = {
    "RunConfig": ("megalite.config.run", "RunConfig"),
    "from_flat": ("megalite.config.run", "from_flat"),
    "check": ("megalite.config.validate", "check"),
    "resolve": ("megalite.config.validate", "resolve"),
    "detect_launch": ("megalite.parallel.launch", "detect"),
    "build_context": ("megalite.training.build", "build_context"),
    "build_components": ("megalite.training.build", "build_components"),
    "build_batches": ("megalite.training.batches", "build_batches"),
    "load_model": ("megalite.training.load_model", "load_model"),
    "pretrain": ("megalite.training.pretrain", "pretrain"),
}
"""Public names: module and name there."""

__all__ = list(_HOMES)


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError("module 'megalite' has no attribute %r" % name)  # noqa: UP031
    module, attribute = _HOMES[name]
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__():
    return sorted(list(globals()) + __all__)
