"""Command line and YAML files -> RunConfig, with every problem told at once. Imports no torch.

tyro draws the help. Reading the flags is done here, since one reader of both sources can report all problems of both
together, in the same words, and knows that the opposite of --no-load-optim is --load-optim.
"""

import os
import sys
import textwrap
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any, NoReturn

import tyro

from megalite.config import validate
from megalite.config.run import (
    ConfigError,
    Option,
    Problem,
    RunConfig,
    example,
    nearest,
    options,
    read_flat,
    with_preset,
    with_values,
)
from megalite.data.bert_config import BertDataConfig
from megalite.nn.config import ModelConfig

PAGE_WIDTH = 100
"""Columns that problems are wrapped to."""
OTHERS_FIRST_SECONDS = 3.0
"""For which ranks that are quiet let another speak first: a launcher ends all when one has ended."""


CONFIG_HELP = (
    "YAML file of flags: one `name: value` a line, names as below without the dashes. Flags win over the file. To take "
    "back what it sets: --no-SWITCH for a switch (--load-optim for --no-load-optim), `--FLAG unset` for a value whose "
    "default is unset."
)


ELSEWHERE = {
    "--group-query-attention": "leave it out: --num-query-groups alone turns grouped queries on",
    "--fp16": "--bf16: fp16 is not there yet",
    "--use-distributed-optimizer": "leave it out: ZeRO is not there yet",
    "--wandb-save-dir": "leave it out, and set WANDB_DIR",
    "--profile-step-start": "--profile FIRST-LAST",
    "--profile-step-end": "--profile FIRST-LAST",
    "--bert-no-binary-head": "--bert-pair none",
    "--apply-residual-connection-post-layernorm": "--norm-placement post: that form itself is not there",
    "--test-data-path": "leave it out: nothing evaluates a test split yet",
    "--context-parallel-size": "--sequence-parallel and --recompute-granularity: context parallelism is not there yet",
}
"""Flags of Megatron-LM that have no counterpart of a similar name here, and what to do instead."""


@dataclass(frozen=True)
class _CommandLine(RunConfig):
    """RunConfig and the flags that are not part of it, for the help."""

    config: Annotated[str | None, tyro.conf.arg(metavar="FILE.yaml", help=CONFIG_HELP)] = None


@dataclass(frozen=True)
class _GPTCommandLine(_CommandLine):
    """The same without the flags that a GPT has no use for."""

    bert: tyro.conf.Suppress[BertDataConfig] = field(default_factory=BertDataConfig)


def parse(
    argv: list[str] | None = None,
    description: str = "",
    quiet: bool = False,
    architecture: str | None = None,
) -> RunConfig:
    """Read flags and the --config file. --help prints the help and exits 0; mistakes are all printed, then exit 2.

    argv: without the program's name; None: sys.argv[1:]. quiet: print nothing (for every rank but the first).
    architecture: the only one that the program trains.
    """
    argv = sys.argv[1:] if argv is None else argv
    if "-h" in argv or "--help" in argv:
        show_help(description, quiet, architecture)
    try:
        return read(argv, architecture)
    except ConfigError as error:
        refuse(error.problems, quiet)


def parse_and_check(
    argv: list[str] | None = None,
    description: str = "",
    launch=None,
    architecture: str | None = None,
) -> RunConfig:
    """`parse`, then every check for this world size, then the configuration with all its defaults filled in.

    Problems are printed by rank 0 only and end every rank with status 2. With --world-size the configuration is checked
    for that size, a summary is printed, and the program ends with status 0: nothing is started. Else torch, which is
    still to be loaded, is told to leave out the warnings of its C++ part, unless TORCH_CPP_LOG_LEVEL says otherwise.
    launch: a LaunchInfo; None: found in the environment.
    """
    if launch is None:
        from megalite.parallel.launch import detect

        try:
            launch = detect(os.environ)
        except ValueError as error:
            refuse(
                [
                    Problem(
                        str(error),
                        "start with torchrun or srun, or with none of their variables set",
                    )
                ]
            )
    quiet = launch.rank != 0
    config = parse(argv, description, quiet, architecture)
    world_size = config.parallel.world_size or launch.world_size
    problems = validate.check(config, world_size)
    if problems:
        # Rank 0 speaks for all; but it cannot see a file that is missing on another node only.
        of_this_node = launch.local_rank == 0 and all(validate.concerns_files(p) for p in problems)
        refuse(problems, quiet and not of_this_node, launch.rank)
    resolved = validate.resolve(config, world_size)
    if config.parallel.world_size is None:
        # When rank 0 dies, every other rank would bury what it says under a stack of C++ frames.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        return resolved
    if not quiet:
        from megalite.config.estimate import summary

        print(summary(resolved, world_size))
    raise SystemExit(0)


def read(argv: list[str], architecture: str | None = None) -> RunConfig:
    """The configuration that a command line asks for. Raises ConfigError with every mistake in it and in its file, and
    when it is not of the architecture that is given."""
    return build(*read_flags(argv), architecture)


def build(
    file: str | None,
    flags: dict[str, Any],
    problems: list[Problem],
    architecture: str | None = None,
) -> RunConfig:
    """`read` from what `read_flags` returns."""
    values = {}
    if file is not None:
        values, in_file = read_yaml(file)
        problems = [*in_file, *problems]
    default = {} if architecture is None else {"architecture": architecture}
    try:
        config = with_values(RunConfig(), default | with_preset(values | flags))
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from None
    asked = config.model.architecture
    if architecture not in (None, asked):
        cause = (
            "--preset " + config.model.preset if config.model.preset else "--architecture " + asked
        )
        message = f"{cause} is a model that this program does not train"
        problems.append(Problem(message, f"python pretrain_{asked}.py", ("architecture", "preset")))
    if problems:
        raise ConfigError(problems)
    return config


def read_flags(
    argv: list[str], more: Iterable[Option] = ()
) -> tuple[str | None, dict[str, Any], list[Problem]]:
    """(file of --config, values by key, problems). `--flag value` or `--flag=value`; hyphens or underscores; the last
    of several wins; a value may not start with two dashes unless joined by `=`. more: options that are not those of a
    run, and hide those of the same name."""
    config_file = Option("config", "", str, False, (), None, ())
    known = (config_file, *(options() | {option.key: option for option in more}).values())
    switches = {flag: (o, on) for o in known if o.kind is bool for flag, on in o.switches.items()}
    valued = {flag: o for o in known if o.kind is not bool for flag in (o.flag, *o.aliases)}
    values, problems = {}, []
    rest = list(argv)
    while rest:
        token = rest.pop(0)
        name, joined, text = token.partition("=")
        flag = name.replace("_", "-")
        if flag in switches and not joined:
            values[switches[flag][0].key] = switches[flag][1]
        elif flag in valued:
            option, words = valued[flag], [text] if joined else []
            while (
                not joined
                and rest
                and not rest[0].startswith("--")
                and (option.kind is tuple or not words)
            ):
                words.append(rest.pop(0))
            _read_value(option, name, words, values, problems)
        else:
            problems.append(_unknown_flag(token, flag, switches, valued))
            if flag.startswith("-") and not joined and rest and not rest[0].startswith("-"):
                rest.pop(0)  # the value meant for the unknown flag; one problem is enough
    return values.pop("config", None), values, problems


def _read_value(
    option: Option, name: str, words: list[str], values: dict, problems: list[Problem]
) -> None:
    """Put the value of one flag, written as these words, into `values`, or a problem into `problems`."""
    fix = f"for example {name} {example(option)}"
    if not words:
        problems.append(
            Problem(
                f"{name} needs a value: {option.expected.replace('null', 'unset')}",
                fix,
                (option.key,),
            )
        )
        return
    try:
        values[option.key] = option.from_words(words)
    except ValueError:
        expected = option.expected.replace("null", "unset")
        problems.append(
            Problem(f"{name}: {' '.join(words)!r} is not {expected}", fix, (option.key,))
        )


def _unknown_flag(token: str, flag: str, switches: dict, valued: dict) -> Problem:
    """What is wrong with a token that is neither a flag nor a flag's value."""
    if flag in switches:
        return Problem(f"{token}: {flag} takes no value", " or ".join(switches[flag][0].switches))
    if not flag.startswith("-"):
        return Problem(
            f"unexpected {token!r}: values follow a flag, and switches take none", "remove it"
        )
    if flag in ELSEWHERE:
        return Problem(f"unknown flag {flag}", ELSEWHERE[flag])
    match = nearest(flag, [*switches, *valued])
    return Problem(
        f"unknown flag {flag}", f"{match}" if match else "remove it (--help lists the flags)"
    )


def read_yaml(file: str) -> tuple[dict[str, Any], list[Problem]]:
    """(values by key, problems) of a YAML file of flat keys."""
    import yaml

    try:
        with open(file, encoding="utf-8") as stream:
            node = yaml.compose(stream, Loader=yaml.SafeLoader)
            loaded = yaml.SafeLoader("").construct_document(node) if node is not None else {}
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        return {}, [
            Problem(f"--config {file}: {reason}", "give the path of a YAML file", ("config",))
        ]
    except yaml.YAMLError as error:
        where = " ".join(str(error).split())
        return {}, [
            Problem(
                f"--config {file} is not YAML: {where}",
                "write one `name: value` a line",
                ("config",),
            )
        ]
    if not isinstance(loaded, dict):
        wrong = f"--config {file} holds a {type(loaded).__name__}, not names and values"
        return {}, [Problem(wrong, "write one `name: value` a line", ("config",))]
    keys = [key.value for key, _ in node.value] if node is not None else []
    repeated = [
        Problem(f"{key!r} is given twice", "keep one of them")
        for key in sorted(set(keys))
        if keys.count(key) > 1
    ]
    values, problems = read_flat(loaded)
    return values, [Problem(f"{file}: {p.message}", p.fix, p.flags) for p in (*repeated, *problems)]


def refuse(problems: list[Problem], quiet: bool = False, rank: int = 0) -> NoReturn:
    """Print every problem with its fix to stderr, or, if quiet, leave another rank the time to; exit with status 2."""
    if quiet:
        time.sleep(OTHERS_FIRST_SECONDS)
    else:
        program = os.path.basename(sys.argv[0]) + (
            f": rank {rank} on {os.uname().nodename}" if rank else ""
        )
        print(report(problems, program), file=sys.stderr)
    raise SystemExit(2)


def report(problems: list[Problem], program: str) -> str:
    """The problems, numbered and wrapped, each with its fix."""
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    lines = [
        f"{program}: {count} in the configuration, nothing was started (--help explains the flags).",
        "",
    ]
    for number, problem in enumerate(problems, 1):
        lines += _wrap(f"{number:3}. ", problem.message)
        lines += _wrap("     fix: ", problem.fix)
    return "\n".join(lines)


def _wrap(prefix: str, text: str) -> list[str]:
    """Lines of at most PAGE_WIDTH columns, indented to the end of the prefix; words such as --tp stay whole."""
    indent = " " * len(prefix)
    return textwrap.wrap(
        text,
        PAGE_WIDTH,
        initial_indent=prefix,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def show_help(description: str, quiet: bool = False, architecture: str | None = None) -> NoReturn:
    """Print the description as it stands and the flags, unless quiet, and exit with status 0. architecture: that of the
    program, which has no use for another's flags."""
    marks = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
    registry = _help_registry()
    try:
        if not quiet:
            print(description.strip(), end="\n\n")  # tyro would join its lines
        shown = (_GPTCommandLine if architecture == "gpt" else _CommandLine)(
            model=ModelConfig(architecture or "gpt")
        )
        tyro.cli(
            type(shown),
            default=shown,
            description="",
            args=["-h"],
            config=marks,
            registry=registry,
            console_outputs=not quiet,
        )
    except (
        BrokenPipeError
    ):  # the reader, such as `head`, has seen enough; the flush at exit must not complain either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(0)


def _help_registry() -> tyro.constructors.ConstructorRegistry:
    """How values that may be unset look in the help: `--save STR (default: unset)`."""
    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def optional(
        info: tyro.constructors.PrimitiveTypeInfo,
    ) -> tyro.constructors.PrimitiveConstructorSpec | None:
        arms = getattr(info.type, "__args__", ())
        if type(None) not in arms:
            return None
        kind = next(arm for arm in arms if arm is not type(None))
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar=_metavar(kind),
            instance_from_str=lambda words: words[0],
            is_instance=lambda value: True,
            str_from_instance=lambda value: ["unset" if value is None else str(value)],
        )

    return registry


def _metavar(kind: Any) -> str:
    """How the value of a type is shown: INT, {1f1b,gpipe}, or STR ... for several words."""
    if getattr(kind, "__origin__", None) is tuple:
        return "STR ..."
    choices = getattr(kind, "__args__", ())
    return "{" + ",".join(choices) + "}" if choices else kind.__name__.upper()
