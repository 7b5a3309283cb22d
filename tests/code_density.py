#!/usr/bin/env python
"""Measure how dense Python code is.

    python tests/code_density.py megalite                    # the whole package
    python tests/code_density.py megalite/nn megalite/data   # a line for each path, then for all

tests/test_code_density.py keeps megalite/ within LIMITS.
"""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

LIMITS = {
    "lines": 35_000,
    "comprehensions": 14.0,  # 4 to 14
    "conditional_expressions": 14.0,  # 6 to 22
    "tuple_assignments": 1.0,  # 1 to 7
    "long_calls": 2.0,  # 0.8 to 2.9
    "wide_lines": 0.1,  # 0.3 to 8
    "comment_lines": 1.3,  # 4 to 12
    "longest_function": 70,
    "longest_file": 500,
    "undocumented": 0,
}
"""The most that megalite/ may have of each figure of `Figures`, of comment lines the least; beside
it what picotron, lingua, torchtitan and nanochat have."""
WIDTH = 100
LONG_CALL = 6


@dataclass
class Figures:
    """Figures of some files. A rate is per 1,000 lines, of `long_calls` per 1,000 calls, in percent
    for lines."""

    lines: float = 0
    statements: float = 0
    comprehensions: float = 0
    conditional_expressions: float = 0
    tuple_assignments: float = 0
    long_calls: float = 0
    """Calls with six or more positional arguments."""
    wide_lines: float = 0
    """Lines of more than 100 columns, percent."""
    comment_lines: float = 0
    """Lines that are a comment, percent."""
    longest_function: float = 0
    longest_file: float = 0
    undocumented: float = 0
    """Public modules, classes and functions without a docstring."""


def python_files(paths: list[Path]) -> list[Path]:
    """The Python files among these files and in these folders."""
    files = []
    for path in paths:
        files += [path] if path.is_file() else sorted(path.rglob("*.py"))
    return files


def measure(paths: list[Path]) -> Figures:
    """The figures of files and folders together."""
    sums = Figures()
    calls = 0
    for path in python_files(paths):
        source = path.read_text(encoding="utf-8")
        lines = source.splitlines()
        sums.lines += len(lines)
        sums.longest_file = max(sums.longest_file, len(lines))
        sums.wide_lines += sum(len(line) > WIDTH for line in lines)
        sums.comment_lines += sum(line.lstrip().startswith("#") for line in lines)
        tree = ast.parse(source)
        sums.undocumented += len(list(undocumented(tree)))
        for node in ast.walk(tree):
            calls += isinstance(node, ast.Call)
            count_node(node, sums)
    rate = 1000 / max(sums.lines, 1)
    sums.comprehensions *= rate
    sums.conditional_expressions *= rate
    sums.tuple_assignments *= rate
    sums.long_calls *= 1000 / max(calls, 1)
    sums.wide_lines *= rate / 10
    sums.comment_lines *= rate / 10
    return sums


def count_node(node: ast.AST, sums: Figures) -> None:
    """Add what one node of a syntax tree is."""
    sums.statements += isinstance(node, ast.stmt)
    match node:
        case ast.ListComp() | ast.SetComp() | ast.DictComp() | ast.GeneratorExp():
            sums.comprehensions += 1
        case ast.IfExp():
            sums.conditional_expressions += 1
        case ast.Assign(targets=targets, value=ast.Tuple()):
            sums.tuple_assignments += any(isinstance(target, ast.Tuple) for target in targets)
        case ast.Call(args=arguments):
            sums.long_calls += len(arguments) >= LONG_CALL
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            length = node.end_lineno - node.lineno + 1
            sums.longest_function = max(sums.longest_function, length)


def undocumented(tree: ast.Module) -> Iterator[str]:
    """Names of public classes and functions, of methods too, that have no docstring."""
    scopes = [tree]
    while scopes:
        for node in scopes.pop().body:
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            if node.name.startswith("_"):
                continue
            if ast.get_docstring(node) is None:
                yield node.name
            if isinstance(node, ast.ClassDef):
                scopes.append(node)


def beyond_limits(figures: Figures) -> list[str]:
    """The figures that are not within LIMITS."""
    problems = []
    for name, limit in LIMITS.items():
        value = getattr(figures, name)
        wrong = value < limit if name == "comment_lines" else value > limit
        if wrong:
            problems.append(f"{name} {value:.1f}, the limit is {limit:g}")
    return problems


def main(paths: list[str]) -> None:
    """Print a table: a column for each path, and one for all of them if there are several."""
    columns = {path: measure([Path(path)]) for path in paths}
    if len(paths) > 1:
        columns["all"] = measure([Path(path) for path in paths])
    widths = [max(10, len(path)) for path in columns]
    headings = [f"{path:>{width}}" for path, width in zip(columns, widths)]
    print(f"{'':24}", *headings, "limit")
    for field in fields(Figures):
        values = [getattr(figures, field.name) for figures in columns.values()]
        shown = [f"{value:>{width},.1f}" for value, width in zip(values, widths)]
        print(f"{field.name:24}", *shown, LIMITS.get(field.name, ""))


if __name__ == "__main__":
    main(sys.argv[1:] or ["megalite"])
