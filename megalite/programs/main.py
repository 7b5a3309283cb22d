"""The command `megalite`: `megalite PROGRAM ...` runs a program with the arguments that follow its name."""

import ast
import os
import sys

from megalite.programs.start import start

PROGRAMS = {
    "pretrain-gpt": "pretrain_gpt",
    "pretrain-bert": "pretrain_bert",
    "train-tokenizer": "train_tokenizer",
    "preprocess": "preprocess_data",
    "merge": "merge_datasets",
    "inspect-dataset": "inspect_dataset",
    "generate": "generate_text",
    "fill-mask": "fill_mask",
    "finetune-classifier": "finetune_classifier",
    "classify": "classify",
    "verify-layouts": "verify_layouts",
    "plot-metrics": "plot_metrics",
    "submit": "submit",
}
"""Name of each program: its module in this folder, and in a checkout its script in tools/ or the root."""


def main() -> int:
    """Run the program that the command line names, or list the programs (status 2 for an unknown name)."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in PROGRAMS:
        sys.argv[:2] = [f"megalite {name}"]
        start(PROGRAMS[name])
    if name in ("-h", "--help"):
        print(overview())
        return 0
    if name == "--version":
        from megalite import __version__

        print(__version__)
        return 0
    print(f"megalite: no program is called {name!r}\n\n{overview()}", file=sys.stderr)
    return 2


def overview() -> str:
    """The usage and a line about each program."""
    width = max(map(len, PROGRAMS))
    lines = ["usage: megalite PROGRAM [flags of the program; --help lists them]", ""]
    for name, module in PROGRAMS.items():
        lines.append(f"  {name:{width}}  {summary(module)}")
    return "\n".join(lines)


def summary(module: str) -> str:
    """The first line of a program's docstring, read without loading the program."""
    path = os.path.join(os.path.dirname(__file__), f"{module}.py")
    with open(path, encoding="utf-8") as file:
        return ast.get_docstring(ast.parse(file.read())).splitlines()[0]
