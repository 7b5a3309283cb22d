"""Prints the tables of docs/huggingface.md from those of megalite/convert/tables.py.

python -m tests.huggingface_table
"""

from megalite.convert.keys import Always, Only, Usual
from megalite.convert.tables import ARCHITECTURES, Architecture


def markdown() -> str:
    """The classes, the tensors of each kind of model, and the keys of config.json."""
    return "\n\n".join([classes(), *tensor_tables(), keys()])


def table(heading: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [heading, ("---",) * len(heading), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def code(text: str) -> str:
    return f"`{text}`" if text else ""


def classes() -> str:
    rows = []
    for architecture in ARCHITECTURES.values():
        names = ", ".join(map(code, architecture.classes))
        rows.append((code(architecture.model_type), names))
    return table(("model_type", "classes that are read; the first is written"), rows)


def tensor_tables() -> list[str]:
    """One table for architectures that have the same names."""
    kinds: dict[tuple, list[Architecture]] = {}
    for architecture in ARCHITECTURES.values():
        kinds.setdefault((*architecture.pieces, architecture.untied), []).append(architecture)
    tables = []
    for pieces, architectures in kinds.items():
        title = ", ".join(architecture.model_type for architecture in architectures)
        rows = []
        names = {piece.theirs for piece in pieces}
        for piece in pieces:
            weight = piece.theirs.removesuffix("bias") + "weight"
            if piece.theirs.endswith(".bias") and weight in names:
                continue  # it is where its weight is
            part = code(piece.order) + (f", {piece.part}" if piece.part else "")
            rows.append((code(piece.theirs), code(piece.ours), part or "the same"))
        tables.append(f"### {title}\n\n" + table(("theirs", "ours", "order of dims, part"), rows))
    return tables


def keys() -> str:
    """Which keys of config.json are which flags."""
    found: dict[tuple[str, str], list[str]] = {}
    for architecture in ARCHITECTURES.values():
        for item in architecture.keys:
            flags = ", ".join(code("--" + name.replace("_", "-")) for name in item.fields)
            if isinstance(item, Only):
                flags = "only " + " or ".join(code(repr(value)) for value in item.allowed)
            if isinstance(item, (Always, Usual)) or not item.names:
                continue
            row = (", ".join(map(code, item.names)), flags)
            found.setdefault(row, []).append(architecture.model_type)
    rows = [(*row, ", ".join(kinds)) for row, kinds in found.items()]
    return "### Keys of config.json\n\n" + table(("key", "flags", "architectures"), rows)


if __name__ == "__main__":
    print(markdown())
