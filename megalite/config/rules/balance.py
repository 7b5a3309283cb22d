"""Rules of how layers are divided into pipeline stages. Imports no torch."""

from collections.abc import Iterator
from typing import Any

from megalite.config.rules.finding import Finding, Rule
from megalite.config.run import RunConfig, options, to_flat, with_values
from megalite.parallel.config import OF_ENDS, OF_EVEN_SPLIT

WAYS = (("pipeline_split",), OF_ENDS, OF_EVEN_SPLIT)
"""Fields that together are one way to divide the layers."""
MOST_TRIED = 6
"""Numbers of one field that are tried as a fix."""


def split_in_one_way(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """By hand, by the layers of first and last rank, or evenly with embedding and loss counted."""
    ways = _ways(config)
    if len(ways) < 2:
        return
    shown = []
    fixes = []
    for kept in ways:
        others = {}
        for way in ways:
            if way != kept:
                others |= way
        fixes.append(others)
        for key in kept:
            shown.append(options()[key].setting(to_flat(config)[key]))
    message = f"{' and '.join(shown)} divide the layers in {len(ways)} ways: give one of them"
    yield Finding(message, *fixes)


def layers_can_be_divided(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """The layers fit the flags that say how to divide them."""
    ways = _ways(config)
    stages = config.pipeline.stages
    if len(ways) != 1 or stages == 1 or stages > config.model.num_layers:
        return  # other rules say it
    problem = _problem(config)
    if problem:
        (unset,) = ways
        yield Finding(problem, *_that_fit(config, unset), unset)


def _ways(config: RunConfig) -> list[dict[str, Any]]:
    """For each way to divide the layers that the flags give: the change that takes it back."""
    flat = to_flat(config)
    found = []
    for keys in WAYS:
        unset = {}
        for key in keys:
            if flat[key] != options()[key].default:
                unset[key] = options()[key].default
        if unset:
            found.append(unset)
    return found


def _problem(config: RunConfig) -> str | None:
    """Why the layers cannot be divided, if so."""
    try:
        config.layers_of_stages  # noqa: B018 - raises
    except ValueError as error:
        return str(error)
    return None


def _that_fit(config: RunConfig, unset: dict[str, Any]) -> list[dict[str, Any]]:
    """Layers of the given ends, of the model, or stages, with which the layers can be divided; the
    nearest numbers first. In place of a split by hand, the default one."""
    fixes = []
    for key in (*OF_ENDS, "num_layers", "pipeline_model_parallel_size"):
        now = to_flat(config)[key]
        if key in OF_ENDS and key not in unset:
            continue
        numbers = sorted(range(1, 2 * config.model.num_layers + 1), key=lambda n: abs(n - now))
        found = 0
        for number in numbers:
            change = {key: number}
            if found < MOST_TRIED and _problem(with_values(config, change)) is None:
                fixes.append(change)
                found += 1
    if "pipeline_split" in unset and config.model.vocab_size is not None:
        balanced = with_values(config, unset).layers_of_stages
        fixes.append({"pipeline_split": (",".join(map(str, map(len, balanced))),)})
    return fixes


BALANCE_RULES: tuple[Rule, ...] = (split_in_one_way, layers_can_be_divided)
