"""Show and check a checkpoint, or compare two.

    python tools/inspect_checkpoint.py checkpoints
    python tools/inspect_checkpoint.py checkpoints --ckpt-step 1000 --verify
    python tools/inspect_checkpoint.py --diff checkpoints/iter_0001000 other

The first shows what the latest checkpoint holds, its sizes, the layout of the ranks that wrote it
and their configuration; also of a damaged checkpoint, as far as it can be read. --verify reads all
of it and lists all damage. --diff compares every tensor of two, of whatever layouts.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from megalite.checkpoint.folder import CheckpointError, find_checkpoint
from megalite.config.cli import parse_options
from megalite.config.run import options
from megalite.config.validate import chosen
from megalite.config.yaml_file import config_of_checkpoint
from megalite.fields import Field
from megalite.programs.reporting import failures_reported, print_errors, refuse
from megalite.system.errors import size_text

if TYPE_CHECKING:
    from megalite.checkpoint.inspection import Inspection


@dataclass(frozen=True)
class InspectCheckpointConfig:
    """Look into a checkpoint."""

    folders: Annotated[tuple[str, ...], Field(positional=True)]
    """Folder of checkpoints, or of one (SAVE/iter_0000100); with --diff two."""
    ckpt_step: Annotated[int | None, Field(minimum=0)] = None
    """Iteration to look at. Unset: the latest."""
    verify: bool = False
    """Read everything and list all damage; the exit status is then 1."""
    diff: bool = False
    """Compare two checkpoints: the largest difference of each tensor. The exit status is 1 when
    they differ."""
    tensors: bool = False
    """List every tensor with its dtype and shape."""
    json: bool = False
    """Print what is shown as JSON."""


def problems_of(config: InspectCheckpointConfig) -> list[str]:
    """What is wrong with the arguments."""
    wanted = 2 if config.diff else 1
    problems = []
    if len(config.folders) != wanted:
        given = " ".join(config.folders)
        problems.append(f"{wanted} folder(s) of checkpoints are needed, not {given}")
    for name in ("verify", "tensors", "json"):
        if config.diff and getattr(config, name):
            problems.append(f"--{name} has no effect with --diff")
    if config.tensors and config.json:
        problems.append("--tensors has no effect with --json")
    return problems


def show(found: "Inspection", tensors: bool) -> None:
    """Print tables of what a checkpoint holds."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from megalite.checkpoint.format import dtype_name

    console = Console(soft_wrap=True)
    facts = Table(title=escape(str(found.folder)), show_header=False)
    for name, value in about(found).items():
        facts.add_row(name, escape(value))
    console.print(facts)
    held = Table("", "tensors", "elements", "size", "dtype")
    for kind, group in found.groups.items():
        sizes = (f"{group.tensors:,}", f"{group.elements:,}", size_text(group.bytes))
        held.add_row(kind, *sizes, ", ".join(group.dtypes))
    console.print(held)
    if tensors and found.index:
        for name in found.index.tensors:
            tensor = found.index.tensors[name]
            boxes = f"in {len(tensor.shards)} boxes" if len(tensor.shards) > 1 else ""
            line = f"{name} {dtype_name(tensor.dtype)} {list(tensor.shape)} {boxes}"
            console.print(line, markup=False, highlight=False)


def about(found: "Inspection") -> dict[str, str]:
    """The facts of a checkpoint by name."""
    sizes = [size for size in found.files.values() if size is not None]
    facts = {"files": f"{len(sizes)}, {size_text(sum(sizes))}"}
    if found.index:
        index = found.index
        facts["iteration"] = str(index.iteration)
        facts["written by"] = f"{index.written_by}, format version {index.format_version}"
        facts["ranks"] = str(index.world_size)
    for name, value in (found.state or {}).items():
        if isinstance(value, dict) and value and not any(map(_is_nested, value.values())):
            facts[name] = ", ".join(f"{key} {number}" for key, number in value.items())
        elif not _is_nested(value) and name not in ("iteration", "megalite"):
            facts[name] = str(value)
    if found.config_yaml is not None:
        facts["configuration"] = flags_of(found)
    return facts


def _is_nested(value: object) -> bool:
    return isinstance(value, (dict, list))


def flags_of(found: "Inspection") -> str:
    """The flags of the run that wrote the checkpoint; those that are not the default."""
    try:
        config = config_of_checkpoint(found.config_yaml)
        values = chosen(config, found.index.world_size if found.index else 1)
        return " ".join(options()[key].setting(value) for key, value in values.items())
    except (ValueError, TypeError, ZeroDivisionError) as error:
        found.problems.append(f"{found.folder / 'config.yaml'} cannot be read: {error}")
        return "unreadable"


def checked(found: "Inspection") -> list[str]:
    """All damage; the progress is shown on a terminal's stderr."""
    from rich.console import Console
    from rich.progress import Progress

    from megalite.checkpoint.damage import damage

    if found.index is None:
        return []
    total = sum(file.bytes for file in found.index.files.values())
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("checking", total=total)
        return damage(found.folder, found.index, lambda done: bar.advance(task, done))


def compare(folders: list[Path]) -> int:
    """Print how two checkpoints differ. Returns 1 when they do."""
    from megalite.checkpoint.inspection import differences
    from megalite.checkpoint.load import Checkpoint

    one, other = (Checkpoint.open(folder) for folder in folders)
    found = 0
    for difference in differences(one, other):
        found += 1
        line = difference.name
        if difference.elements:
            line += (
                f": {difference.elements:,} elements differ, by up to {difference.absolute:.3g}, "
                f"relative {difference.relative:.3g}"
            )
        if difference.note:
            line += f": {difference.note}"
        print(line, flush=True)
    names = len({*one.names, *other.names})
    print(f"{found} of {names} tensors differ, {names - found} are equal")
    return 1 if found else 0


def folder_of(root: Path, step: int | None) -> Path:
    """The folder of the checkpoint to look at. Raises CheckpointError when there is none; one that
    has no index is taken where its folder is named."""
    try:
        return find_checkpoint(root, step)
    except CheckpointError:
        if step is None and any(root.glob("weights-*.safetensors")):
            return root
        raise


def main() -> int:
    """Exit status 0, 1 for damage or a difference, 2 when the arguments are at fault."""
    config = parse_options(InspectCheckpointConfig, __doc__)
    refuse(problems_of(config))
    with failures_reported():
        folders = [folder_of(Path(root), config.ckpt_step) for root in config.folders]
        if config.diff:
            return compare(folders)
        from megalite.checkpoint.inspection import inspect

        found = inspect(folders[0])
        if not config.json:
            show(found, config.tensors)
        if config.verify:
            known = set(found.problems)
            found.problems += [line for line in checked(found) if line not in known]
        if config.json:
            print(found.to_json(config.verify))
        elif config.verify and not found.problems:
            files = found.index.files.values()
            size = size_text(sum(file.bytes for file in files))
            print(f"verified: all {len(files)} files, {size}, are as they were written")
    print_errors(found.problems)
    return 1 if found.problems else 0
