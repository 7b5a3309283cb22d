"""Quick looks at folders. Imports no torch."""

import difflib
import os
import re

MAKE_DATA = "make it with tools/preprocess_data.py"
SHOWN_NAMES = 5
"""Names listed when a file is not there."""


def stored_iterations(folder: str) -> list[int]:
    """Iterations with a complete checkpoint in a folder, ascending; one that was being replaced counts too."""
    pattern = re.compile(r"iter_(\d{7,})(\.replaced-\d+)?")
    found = {
        int(match[1])
        for name in listing(folder)
        if (match := pattern.fullmatch(name))
        and os.path.isfile(os.path.join(folder, name, "index.json"))
    }
    return sorted(found)


def same_place(one: str | None, other: str | None) -> bool:
    """Whether two paths lead to the same place, which need not exist."""
    return (
        one is not None and other is not None and os.path.realpath(one) == os.path.realpath(other)
    )


def listing(folder: str) -> list[str]:
    """Names in a folder, sorted; [] when it cannot be read."""
    try:
        return sorted(os.listdir(folder or "."))
    except OSError:
        return []


def neighbours(path: str, suffix: str) -> list[str]:
    """Paths beside `path` with this suffix, the suffix removed, most similar first."""
    folder, name = os.path.split(path)
    names = [n.removesuffix(suffix) for n in listing(folder) if n.endswith(suffix)]
    ranked = sorted(
        names, key=lambda n: -difflib.SequenceMatcher(None, n, name.removesuffix(suffix)).ratio()
    )
    return [os.path.join(folder, n) for n in ranked[:SHOWN_NAMES]]
