"""Helpers of the rules that read files (files.py, data.py, bert.py, gpt.py, tokenizer.py): paths,
folder listings, wording. No rule is here. Imports no torch."""

import difflib
import os

from megalite.data.indexed import REMAKE
from megalite.system.errors import error_message

MAKE_DATA = "make it with tools/preprocess_data.py"
"""The fix for a dataset that is missing or damaged."""
SHOWN_NAMES = 5
"""Names listed when a file is not there."""


def without_fix(error: Exception) -> str:
    """The message of a dataset's error without the fix that MAKE_DATA names in its place."""
    return error_message(error).removesuffix(f". {REMAKE}")


def same_place(one: str | None, other: str | None) -> bool:
    """Whether two paths lead to the same place, which need not exist."""
    return None not in (one, other) and os.path.realpath(one) == os.path.realpath(other)


def neighbours(path: str, suffix: str) -> list[str]:
    """Paths beside `path` with this suffix, the suffix removed, most similar first; [] when the
    folder cannot be read."""
    folder, name = os.path.split(path)
    try:
        listing = sorted(os.listdir(folder or "."))
    except OSError:
        return []
    wanted = name.removesuffix(suffix)
    names = [n.removesuffix(suffix) for n in listing if n.endswith(suffix)]
    names.sort(key=lambda n: -difflib.SequenceMatcher(None, n, wanted).ratio())
    return [os.path.join(folder, n) for n in names[:SHOWN_NAMES]]
