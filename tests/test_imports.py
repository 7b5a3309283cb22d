"""No module imports itself through others: files can be read from the bottom up."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path, modules: set[str]) -> set[str]:
    """Modules of megalite that a file imports when it is loaded or later, but not for type checkers
    alone."""
    tree = ast.parse(path.read_text())
    for_types = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for_types.update(map(id, ast.walk(node)))
    found = set()
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (names & modules) or ({node.module} & modules)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & modules
    return found - {"megalite"}


def test_no_circle_between_files():
    """Imports within functions count as well."""
    paths = {module_name(path): path for path in sorted((ROOT / "megalite").rglob("*.py"))}
    graph = {name: imports_of(path, set(paths)) for name, path in paths.items()}
    assert len(graph) > 150 and "megalite.parallel.layout" in graph["megalite.parallel.context"]
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(f"modules import each other: {' -> '.join(error.args[1])}") from None
