"""Rules of how layers are divided into pipeline stages. Imports no torch."""

from collections.abc import Iterator

from megalite.config.rules.finding import Finding, Rule, each
from megalite.config.run import RunConfig, options, to_flat, with_values
from megalite.parallel.config import OF_ENDS, OF_EVEN_SPLIT, OF_SPLIT, ParallelConfig

WAYS = (("pipeline_split",), OF_ENDS, OF_EVEN_SPLIT)
"""Fields that together are one way to divide the layers."""
MOST_TRIED = 6
"""Numbers of one field that are tried as a fix."""


def _given(parallel: ParallelConfig, keys: tuple[str, ...]) -> list[str]:
    """Those of the fields that are set."""
    return [key for key in keys if getattr(parallel, key) not in (None, False)]


def _without(keys: tuple[str, ...] | list[str]) -> dict[str, object]:
    """The change that leaves fields of the split out."""
    return {key: options()[key].default for key in keys}


def split_in_one_way(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """By hand, by the layers of first and last rank, or evenly with embedding and loss counted."""
    ways = [found for keys in WAYS if (found := _given(config.parallel, keys))]
    if len(ways) > 1:
        flat = to_flat(config)
        shown = [options()[key].setting(flat[key]) for way in ways for key in way]
        fixes = []
        for kept in ways:
            fixes.append(_without([key for way in ways if way != kept for key in way]))
        message = f"{', '.join(shown)} divide the layers in {len(ways)} ways: give one"
        yield Finding(message, *fixes)


def layers_can_be_divided(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """The layers fit the flags that say how to divide them."""
    parallel = config.parallel
    given = _given(parallel, OF_SPLIT)
    stages = len(parallel.rank_of_stage)
    one_way = len([keys for keys in WAYS if _given(parallel, keys)]) == 1
    if not one_way or stages == 1 or stages > config.model.num_layers:
        return  # other rules say it
    try:
        config.layers_of_stages  # noqa: B018 - raises
    except ValueError as error:
        yield Finding(str(error), *_that_fit(config, given), _without(given))


def _that_fit(config: RunConfig, given: list[str]) -> list[dict[str, object]]:
    """Layers of the given ends, of the model, or stages, with which the layers can be divided; the
    nearest numbers first."""
    fixes = []
    for key in (*OF_ENDS, "num_layers", "pipeline_model_parallel_size"):
        now = to_flat(config)[key]
        if key in OF_ENDS and key not in given:
            continue
        numbers = sorted(range(1, 2 * config.model.num_layers + 1), key=lambda n: abs(n - now))
        fitting = [change for change in each(key, numbers) if _fits(with_values(config, change))]
        fixes += fitting[:MOST_TRIED]
    balanced = with_values(config, _without(given))
    if "pipeline_split" in given and config.model.vocab_size is not None:
        counts = [str(len(layers)) for layers in balanced.layers_of_stages]
        fixes.append({"pipeline_split": (",".join(counts),)})
    return fixes


def _fits(config: RunConfig) -> bool:
    try:
        config.layers_of_stages  # noqa: B018 - raises
    except ValueError:
        return False
    return True


BALANCE_RULES: tuple[Rule, ...] = (split_in_one_way, layers_can_be_divided)
