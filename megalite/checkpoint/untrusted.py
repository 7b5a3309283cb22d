"""Values that a file states, checked before they are used. Imports no torch.

Each function raises TypeError or ValueError when the value is none of its kind.
"""

LONGEST_DIM = 1 << 62
MOST_DIMS = 64


def size_in(value: object) -> int:
    """A number of bytes, elements or ranks."""
    if type(value) is not int:
        raise TypeError(f"{value!r:.80} should be a whole number")
    if not 0 <= value < LONGEST_DIM:
        raise ValueError(f"{value} is no size")
    return value


def shape_in(values: object) -> tuple[int, ...]:
    """A shape."""
    if type(values) is not list:
        raise TypeError(f"{values!r:.80} should be a list of sizes")
    if len(values) > MOST_DIMS:
        raise ValueError(f"{len(values)} dims")
    return tuple(map(size_in, values))


def text_in(value: object) -> str:
    """A text."""
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.80} should be text")
    return value


def file_name_in(value: object) -> str:
    """The name of a file in the same folder: `../../secret` would lead out of it."""
    name = text_in(value)
    if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise ValueError(f"unsafe file name {name!r}: it must lie in this folder")
    return name
