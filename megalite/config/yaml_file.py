"""Configurations as YAML files, and in checkpoints. Imports no torch.

YAML 1.1 turns 0123 into 83, 1:30 into 90, 1_000 into 1000 and `no` into false. Here a plain scalar
is null, true or false, a number in decimal digits, or else the text as it stands; an option that
wants a number refuses the text and says what YAML 1.1 would have read.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import yaml

from megalite.checkpoint.folder import CONFIG_FILE
from megalite.config.problem import ConfigError, Problem
from megalite.config.run import RunConfig, read_flat, to_flat, with_preset, with_values
from megalite.system.errors import explain_os_error

TEXT_TAG = "tag:yaml.org,2002:str"
PLAIN: tuple[tuple[str, Callable[[str], Any]], ...] = (
    (r"~|null|Null|NULL|", lambda text: None),
    (r"true|True|TRUE|yes|Yes|YES|on|On|ON", lambda text: True),
    (r"false|False|FALSE|no|No|NO|off|Off|OFF", lambda text: False),
    (r"[-+]?(0|[1-9][0-9]*)", int),
    (r"[-+]?(0|[1-9][0-9]*|(?=\.[0-9]))\.[0-9]*([eE][-+]?[0-9]+)?", float),
)
"""What a plain scalar of a form means; any other is text."""


def to_yaml(config: RunConfig) -> str:
    """The whole configuration as a YAML file that --config reads back to the same values."""
    flat = to_flat(config)
    for key, value in flat.items():
        if isinstance(value, tuple):
            flat[key] = list(value)
    return yaml.safe_dump(flat, sort_keys=False)


@lru_cache(maxsize=4)
def config_of_checkpoint(text: str, file: str = CONFIG_FILE) -> RunConfig:
    """The configuration in a checkpoint's config.yaml. Kept, since several rules ask for it.

    Fields that the file does not have take their defaults. Raises ConfigError, a ValueError, when
    it cannot be read, with the name of the file.
    """
    values, problems = parse_yaml(text, file)
    if problems:
        raise ConfigError(problems)
    return with_values(RunConfig(), with_preset(values))


def read_yaml(file: str) -> tuple[dict[str, Any], list[Problem]]:
    """(values by key, problems) of the YAML file of --config."""
    try:
        with open(file, encoding="utf-8-sig") as stream:
            text = stream.read()
    except (OSError, UnicodeDecodeError) as error:
        reason = f"{file}: not UTF-8 text"
        if isinstance(error, OSError):
            reason = explain_os_error(error)
        fix = "give the path of a YAML file"
        return {}, [Problem(f"--config {reason}", fix, ("config",))]
    return parse_yaml(text, file)


def parse_yaml(text: str, file: str) -> tuple[dict[str, Any], list[Problem]]:
    """(values by key, problems) of YAML text of flat keys; `file` names it in the problems."""
    try:
        node = yaml.compose(text, Loader=yaml.BaseLoader)  # which makes no guess about scalars
    except yaml.YAMLError as error:
        where = " ".join(str(error).split())
        problem = _malformed(f"{file} is not YAML: {where}")
        if r"'\t'" in where:
            problem = replace(problem, fix="indent and separate with spaces, not tabs")
        return {}, [problem]
    except RecursionError:
        return {}, [_malformed(f"{file} is nested too deeply")]
    if node is None:
        return {}, []
    if not isinstance(node, yaml.MappingNode):
        kind = "list" if isinstance(node, yaml.SequenceNode) else "text"
        return {}, [_malformed(f"{file} holds a {kind}, not names and values")]
    # The values as they are meant, and how messages show them.
    flat = {}
    written = {}
    repeated = []
    for key_node, value_node in node.value:
        name = key_node.value if isinstance(key_node, yaml.ScalarNode) else _source(key_node)
        if name in flat and name not in repeated:
            repeated.append(name)
        flat[name] = _value(value_node)
        written[name] = _shown(value_node)
    values, found = read_flat(flat, written)
    problems = [Problem(f"{name!r} is given twice", "keep one of them") for name in repeated]
    problems += found
    # Keys are flat; a section of keys is an unknown key whose value is a mapping.
    sections = [str(name) for name, value in flat.items() if isinstance(value, yaml.MappingNode)]
    advice = {
        f"unknown key {name!r}": "write its keys without it, on the outermost level"
        for name in sections
    }
    found = []
    for p in problems:
        found.append(Problem(f"{file}: {p.message}", advice.get(p.message, p.fix), p.keys))
    return values, found


def _malformed(message: str) -> Problem:
    return Problem(message, "write one `name: value` a line", ("config",))


def _source(node: yaml.Node) -> str:
    """The text of a node in its file, on one line."""
    start = node.start_mark
    return " ".join(start.buffer[start.pointer : node.end_mark.pointer].rstrip("\0").split())


def _shown(node: yaml.Node) -> str:
    """The text of a value for a message: `0123 (83 in YAML 1.1)` where the two readings differ."""
    source = _source(node)
    if not isinstance(_value(node), str) or node.style is not None:
        return source
    try:
        other = yaml.safe_load(source)
    except (yaml.YAMLError, ValueError):
        return source
    return source if isinstance(other, str) else f"{source} ({other} in YAML 1.1)"


def _value(node: yaml.Node) -> Any:
    """What a value means: a scalar, or a list of scalars. Anything else stays a node, which no
    option accepts."""
    if isinstance(node, yaml.SequenceNode):
        return [_value(item) for item in node.value]
    if not isinstance(node, yaml.ScalarNode) or node.tag != TEXT_TAG:
        return node
    if node.style is None:
        for pattern, meaning in PLAIN:
            if re.fullmatch(pattern, node.value):
                return meaning(node.value)
    return node.value
