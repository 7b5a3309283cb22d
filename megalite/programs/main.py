"""The command `megalite`: `megalite PROGRAM ...` runs a program with the arguments that follow its
name."""

import ast
import importlib
import re
import sys
from pathlib import Path

from megalite import __version__

PROGRAMS = {
    "pretrain-gpt": "pretrain_gpt",
    "pretrain-bert": "pretrain_bert",
    "train-tokenizer": "train_tokenizer",
    "preprocess": "preprocess_data",
    "merge": "merge_datasets",
    "inspect-dataset": "inspect_dataset",
    "inspect-checkpoint": "inspect_checkpoint",
    "generate": "generate_text",
    "fill-mask": "fill_mask",
    "finetune-classifier": "finetune_classifier",
    "classify": "classify",
    "convert-checkpoint": "convert_checkpoint",
    "verify-layouts": "verify_layouts",
    "plot-metrics": "plot_metrics",
    "draw-schedule": "draw_schedule",
    "submit": "submit",
}
"""Module of each program in this folder; a checkout has a script of the same name in tools/, or in
its root."""


def main() -> int | None:
    """Run the program that the command line names, or list the programs. Status 2 for an unknown
    name."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in PROGRAMS:
        sys.argv[:2] = [f"megalite {name}"]
        program = importlib.import_module(f"megalite.programs.{PROGRAMS[name]}")
        program.__doc__ = with_commands(program.__doc__)
        return program.main()
    if name in ("-h", "--help"):
        print(overview())
        return 0
    if name == "--version":
        print(__version__)
        return 0
    print(f"error: no program is called {name!r}\n\n{overview()}", file=sys.stderr)
    return 2


def overview() -> str:
    """The usage, and one line about each program."""
    width = max(map(len, PROGRAMS))
    lines = ["usage: megalite PROGRAM ...", ""]
    lines.append("megalite PROGRAM --help lists the flags of a program:")
    for name, module in PROGRAMS.items():
        lines.append(f"  {name:{width}}  {summary(module)}")
    return "\n".join(lines)


def summary(module: str) -> str:
    """The first line of a program's docstring, read from its source: loading the program would take
    longer."""
    source = Path(__file__).with_name(f"{module}.py").read_text(encoding="utf-8")
    return ast.get_docstring(ast.parse(source)).splitlines()[0]


def with_commands(text: str) -> str:
    """A help text with commands of `megalite` in place of the scripts of a checkout."""
    commands = {module: f"megalite {name}" for name, module in PROGRAMS.items()}

    def command(found: re.Match) -> str:
        if found["script"] not in commands:
            return found[0]
        launcher = found["torchrun"]
        return (f"{launcher}-m " if launcher else "") + commands[found["script"]]

    script = r"(?P<torchrun>--nproc-per-node \d+ )?(python )?(tools/)?(?P<script>\w+)\.py"
    return re.sub(script, command, text)
