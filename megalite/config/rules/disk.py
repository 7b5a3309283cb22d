"""What rules on files share: paths, folder listings, wording. Imports no torch."""

import difflib
import os

MAKE_DATA = "make it with tools/preprocess_data.py"
"""The fix for a dataset that is missing or damaged."""
SHOWN_NAMES = 5
"""Names listed when a file is not there."""


def without_remedy(error: Exception) -> str:
    """The message of a dataset's error without the remedy that MAKE_DATA offers as the fix."""
    from megalite.data.indexed import REMAKE

    return str(error).removesuffix(f". {REMAKE}")


def same_place(one: str | None, other: str | None) -> bool:
    """Whether two paths lead to the same place, which need not exist."""
    if one is None or other is None:
        return False
    return os.path.realpath(one) == os.path.realpath(other)


def neighbours(path: str, suffix: str) -> list[str]:
    """Paths beside `path` with this suffix, the suffix removed, most similar first."""
    folder, name = os.path.split(path)
    wanted = name.removesuffix(suffix)
    names = [n.removesuffix(suffix) for n in _listing(folder) if n.endswith(suffix)]
    names.sort(key=lambda n: -difflib.SequenceMatcher(None, n, wanted).ratio())
    return [os.path.join(folder, n) for n in names[:SHOWN_NAMES]]


def _listing(folder: str) -> list[str]:
    """Names in a folder, sorted; [] when it cannot be read."""
    try:
        return sorted(os.listdir(folder or "."))
    except OSError:
        return []
