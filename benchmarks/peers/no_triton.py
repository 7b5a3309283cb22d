"""Megatron-core on a machine without triton, which it imports without need."""

import builtins
import types


class Inert(types.ModuleType):
    """Stands for a module or object that is named but not used: any attribute is there, and as a
    decorator it gives the function back."""

    __version__ = "3.4.0"

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Inert(name)

    def __call__(self, *args, **kwargs):
        """The function that is decorated, or something inert."""
        return args[0] if len(args) == 1 and callable(args[0]) else Inert("result")


def without_triton() -> None:
    """Give megatron-core's modules, and no others, an inert triton."""
    find = builtins.__import__

    def give(name, globals=None, locals=None, fromlist=(), level=0):
        asker = (globals or {}).get("__name__", "")
        if name.split(".")[0] == "triton" and asker.startswith("megatron"):
            return Inert("triton")
        return find(name, globals, locals, fromlist, level)

    builtins.__import__ = give
