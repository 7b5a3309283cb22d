"""From a command line to a checked RunConfig, with every problem reported at once. No torch."""

import os
import sys
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, fields
from typing import Annotated, Any, NoReturn, TypeVar

from megalite.config import validate
from megalite.config.flags import read_own_flags
from megalite.config.help import help_text, wrapped
from megalite.config.problem import ConfigError, Problem
from megalite.config.rules.files import fields_of_checkpoint
from megalite.config.run import RunConfig, fill_published, options, with_preset, with_values
from megalite.config.schedule import why_chosen
from megalite.config.summary import given, summary_lines
from megalite.config.yaml_file import read_yaml, to_yaml
from megalite.fields import Field
from megalite.parallel.launch import OTHERS_FIRST_SECONDS, LaunchInfo, detect

T = TypeVar("T")
START_SKEW_SECONDS = 2.0
"""Ranks of one job start this far apart."""


@dataclass(frozen=True)
class ConfigFile:
    """Where flags are read from besides the command line."""

    config: Annotated[str | None, Field(metavar="FILE.yaml")] = None
    """YAML file of flags: one `name: value` a line, names as below without the dashes. Flags win
    over the file. To take back what it sets: --no-SWITCH for a switch (--load-optim for
    --no-load-optim), `--FLAG unset` for a value whose default is unset."""


@dataclass(frozen=True)
class CommandLine(ConfigFile):
    """What is asked for besides the configuration."""

    print_config: bool = False
    """Print the whole configuration with every default filled in, as a file for --config, and
    exit."""


def parse_and_check(
    argv: list[str],
    description: str = "",
    launch: LaunchInfo | None = None,
    architecture: str | None = None,
) -> RunConfig:
    """The configuration of this run: read, checked for its world size, every default filled in.

    argv: without the program's name. description: what --help prints first.
    launch: None: found in the environment. architecture: the only one that the program trains.

    --help, --print-config and --world-size (which checks for that size and prints a summary) end
    the program with status 0. Problems are all printed, by rank 0, and end every rank with status
    2. Otherwise, sets TORCH_CPP_LOG_LEVEL for torch, which is still to be loaded.
    """
    return parse_with_given(argv, description, launch, architecture)[1]


def parse_with_given(
    argv: list[str],
    description: str = "",
    launch: LaunchInfo | None = None,
    architecture: str | None = None,
) -> tuple[Collection[str], RunConfig]:
    """(keys of the fields that the command line and its file give, the configuration as
    `parse_and_check`)."""
    if launch is None:
        launch = detect_launch_or_exit()
    quiet = launch.rank != 0
    show_help(argv, description, run_groups(architecture), quiet, architecture=architecture)
    # Read.
    try:
        command, asked = _read_command_line(argv, architecture)
    except ConfigError as error:
        refuse(error.problems, quiet)
    # Check.
    config = asked.config
    world_size = config.parallel.world_size or launch.world_size
    problems = asked.contradictions + validate.check(config, world_size, asked.values)
    if problems:
        # Rank 0 reports for all ranks, but it cannot see that a file is missing on another node.
        of_this_node = launch.local_rank == 0 and all(p.of_node for p in problems)
        refuse(problems, quiet and not of_this_node, launch.rank)
    resolved = validate.resolve(config, world_size)
    if not quiet and not command.print_config and config.parallel.pipeline_schedule == "auto":
        print(why_chosen(config, resolved, world_size))
    # Train, or print and exit.
    if not command.print_config and config.parallel.world_size is None:
        # When rank 0 dies, every other rank would bury what it says under a stack of C++ frames.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        return set(asked.values), resolved
    if not quiet and command.print_config:
        print(to_yaml(with_values(given(resolved), {"world_size": None})), end="")
    elif not quiet:
        print("The configuration is sound. Nothing was started.")
        print("\n".join(summary_lines(resolved, world_size)))
    raise SystemExit(0)


def detect_launch_or_exit() -> LaunchInfo:
    """What the launcher says of this process. A launcher's variables that do not fit together are
    printed, and end the process with status 2."""
    try:
        return detect(os.environ)
    except ValueError as error:
        fix = "start with torchrun or srun, or with none of their variables set"
        refuse([Problem(str(error), fix)])


def read_config(argv: list[str], architecture: str | None = None) -> RunConfig:
    """The configuration that a command line asks for. Raises ConfigError with every problem of it
    and of its file, and when it is not of the given architecture."""
    _, asked = _read_command_line(argv, architecture)
    return asked.without_contradictions()


@dataclass(frozen=True)
class Asked:
    """What a command line and its file say of the configuration."""

    values: dict[str, Any]
    """By key: those that are written there, and that --load-hf or a preset gives."""
    config: RunConfig
    """Made of them."""
    contradictions: list[Problem]
    """Values that contradict --load-hf, in whose place `config` has the folder's."""

    def without_contradictions(self) -> RunConfig:
        """The configuration. Raises ConfigError where a value contradicts --load-hf."""
        if self.contradictions:
            raise ConfigError(self.contradictions)
        return self.config


def _read_command_line(argv: list[str], architecture: str | None) -> tuple[CommandLine, Asked]:
    """(what a command line asks for besides the configuration, what it says of that). Raises
    ConfigError with every problem that leaves the configuration unknown."""
    own, flags, problems = read_own_flags(CommandLine, argv, options().values())
    command = CommandLine(**own)
    return command, _build(command.config, flags, problems, architecture)


def build_config(
    file: str | None,
    flags: dict[str, Any],
    problems: list[Problem],
    architecture: str | None = None,
) -> RunConfig:
    """The configuration from a --config file and the values of flags, which win.

    problems: of the flags. Raises ConfigError with these and those of the file.
    """
    return _build(file, flags, problems, architecture).without_contradictions()


def _build(
    file: str | None, flags: dict[str, Any], problems: list[Problem], architecture: str | None
) -> Asked:
    """What a --config file and flags say. Raises ConfigError, as `_read_command_line`."""
    values = {}
    if file is not None:
        values, in_file = read_yaml(file)
        problems = [*in_file, *problems]
    default = {} if architecture is None else {"architecture": architecture}
    values |= flags
    try:
        if values.get("use_checkpoint_args"):
            default |= fields_of_checkpoint(values)
        values, contradictions = fill_published(values)
        values = default | with_preset(values)
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from None
    config = with_values(RunConfig(), values)
    # The program trains one architecture only.
    model = config.model
    if architecture not in (None, model.architecture):
        cause = f"--architecture {model.architecture}"
        if model.preset:
            cause = f"--preset {model.preset}"
        elif config.checkpoint.load_hf:
            cause = f"--load-hf {config.checkpoint.load_hf}"
        message = f"{cause} is a model that this program does not train"
        fix = f"python pretrain_{model.architecture}.py"
        problems = [*problems, Problem(message, fix, ("architecture", "preset"))]
    if problems:
        raise ConfigError([*problems, *contradictions])
    return Asked(values, config, contradictions)


def parse_options(
    kind: type[T],
    description: str,
    argv: list[str] | None = None,
    check: Callable[[T], Iterable[str]] = lambda options: (),
) -> T:
    """The options of a tool: an object of the dataclass `kind` from a command line.

    check: what is wrong with them, beside single numbers out of range, each with what would work.

    --help prints the help and exits with status 0; problems are all printed and exit with status 2.
    """
    argv = sys.argv[1:] if argv is None else argv
    show_help(argv, description, {"options": kind})
    values, _, problems = read_own_flags(kind, argv)
    try:
        options = kind(**values)
    except TypeError:  # a value without a default is missing, or could not be read
        refuse(problems)
    problems += [Problem(text, "") for text in check(options)]
    if problems:
        refuse(problems)
    return options


def refuse(problems: list[Problem], quiet: bool = False, rank: int = 0) -> NoReturn:
    """Print every problem with its fix to stderr and exit with status 2. quiet: print nothing, and
    exit a little later, since a launcher ends all ranks as soon as one has ended."""
    if quiet:
        time.sleep(START_SKEW_SECONDS + OTHERS_FIRST_SECONDS)
    else:
        program = os.path.basename(sys.argv[0])
        if rank:
            program += f": rank {rank} on {os.uname().nodename}"
        print(report(problems, program), file=sys.stderr)
    raise SystemExit(2)


def report(problems: list[Problem], program: str) -> str:
    """The problems, numbered and wrapped, each with its fix."""
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    heading = f"{program}: {count} in the configuration, nothing was started"
    lines = [f"{heading} (--help explains the flags).", ""]
    for number, problem in enumerate(problems, 1):
        lines += wrapped(problem.message, f"{number:3}. ")
        if problem.fix:
            lines += wrapped(problem.fix, "     fix: ")
    return "\n".join(lines)


def run_groups(architecture: str | None = None) -> dict[str, type]:
    """The dataclasses of a run's flags by their titles in --help, without those that a program of
    one architecture has no use for."""
    groups = {"options": CommandLine}
    for section in fields(RunConfig):
        if section.name != "bert" or architecture != "gpt":
            groups[f"{section.name} options"] = section.type
    return groups


def show_help(
    argv: list[str],
    description: str,
    groups: dict[str, type],
    quiet: bool = False,
    architecture: str | None = None,
) -> None:
    """If the command line asks for it, print the help, unless quiet, and exit with status 0.

    groups: dataclasses of flags by title. architecture: the only one that the program trains.
    """
    if "-h" not in argv and "--help" not in argv:
        return
    if not quiet:
        defaults = {"architecture": architecture} if architecture else {}
        print(help_text(description, groups, defaults), flush=True)
    raise SystemExit(0)
