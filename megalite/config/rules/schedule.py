"""Rules of the pipeline's schedule: it fits the stages, the layers and the microbatches. Imports no
torch."""

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from megalite.config.rules.finding import (
    Finding,
    Rule,
    data_parallel_size,
    divisors,
    each,
    flag_of,
    global_batch,
)
from megalite.config.rules.tokenizer import build_tokenizer
from megalite.config.run import RunConfig, options, with_values
from megalite.config.schedule import GIB, STAGES_ON_A_RANK, candidates, memory_limit, schedule_name
from megalite.data.tokenizers import TokenizerError
from megalite.parallel.config import OF_EVEN_SPLIT
from megalite.pipeline.schedules import SCHEDULES

GROUP = "microbatch_group_size_per_virtual_pipeline_stage"
VIRTUAL = "num_virtual_stages_per_pipeline_rank"
LAYERS = "num_layers_per_virtual_pipeline_stage"


def schedule_orders_a_pipeline(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """The flags of the schedule, with one rank: only what says that there is one stage."""
    p = config.parallel
    if p.pipeline_model_parallel_size > 1:
        return
    harmless = {"pipeline_schedule": ("1f1b", "auto"), VIRTUAL: (1,)}
    for key in ("pipeline_schedule", VIRTUAL, LAYERS, GROUP, "memory_limit_gib"):
        value = getattr(p, key)
        if value is not None and value not in harmless.get(key, ()):
            yield Finding(
                f"{options()[key].setting(value)} has no effect with one pipeline stage",
                {"pipeline_model_parallel_size": 2},
                {key: None},
            )


def stages_are_counted_once(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """Stages on a rank, or layers of a stage."""
    p = config.parallel
    stages = p.num_virtual_stages_per_pipeline_rank
    layers = p.num_layers_per_virtual_pipeline_stage
    if p.pipeline_model_parallel_size > 1 and stages is not None and layers is not None:
        yield Finding(
            f"{flag_of(VIRTUAL)} {stages} and {flag_of(LAYERS)} {layers} both say how many stages "
            "a rank holds",
            {LAYERS: None},
            {VIRTUAL: None},
        )


def layers_fill_virtual_stages(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """layers % (layers of a stage * pp), where embedding and loss may count as layers."""
    ranks = config.parallel.pipeline_model_parallel_size
    size = config.parallel.num_layers_per_virtual_pipeline_stage
    layers = config.divided_layers
    if ranks == 1 or size is None or layers % (size * ranks) == 0:
        return
    fixes = []
    if layers % ranks == 0:
        fixes = each(LAYERS, divisors(layers // ranks, size))
    counted = layers - config.model.num_layers
    more = f" and {counted} more for embedding and loss" if counted else ""
    yield Finding(
        f"--num-layers {config.model.num_layers}{more} cannot be divided into stages of "
        f"{flag_of(LAYERS)} {size} on --pp {ranks} ranks, {size * ranks} layers at a time",
        *fixes,
        {LAYERS: None},
        also=("pipeline_schedule", *OF_EVEN_SPLIT),
    )


def schedule_takes_its_stages(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """The schedule is made for as many stages on a rank as are given."""
    p = config.parallel
    name = p.pipeline_schedule
    given = config.given_chunks
    if p.pipeline_model_parallel_size == 1 or name in (None, "auto") or given is None:
        return
    takes = SCHEDULES[name].chunks
    if given in takes:
        return
    few = "1 stage" if takes.start == 1 else f"{takes.start} stages"
    if len(takes) > 1:
        few += " or more"
    key = VIRTUAL if p.num_virtual_stages_per_pipeline_rank is not None else LAYERS
    right = {key: takes.start}
    if key == LAYERS:
        layers = config.divided_layers // (p.pipeline_model_parallel_size * takes.start)
        right = {key: max(1, layers)}
    others = [other for other, schedule in SCHEDULES.items() if given in schedule.chunks]
    makes = "" if key == VIRTUAL else f", which makes {given}"
    yield Finding(
        f"--pipeline-schedule {name} needs {few} on a rank, not {flag_of(key)} "
        f"{getattr(p, key)}{makes}",
        right,
        *each("pipeline_schedule", sorted(others, key=lambda other: other == "gpipe")),
        {key: None},
        also=("num_layers", "pipeline_model_parallel_size"),
    )


def virtual_stages_hold_layers(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """At least one layer for every stage, where a rank holds several."""
    ranks = config.parallel.pipeline_model_parallel_size
    layers = config.model.num_layers
    chunks = config.pipeline.chunks
    if chunks == 1 or ranks == 1 or layers >= ranks * chunks:
        return
    name = schedule_name(config)
    yield Finding(
        f"--pipeline-schedule {name} with {chunks} stages on each of --pp {ranks} ranks makes "
        f"{ranks * chunks} stages for --num-layers {layers}: each needs at least one layer",
        *each(VIRTUAL, range(layers // ranks, 1, -1)),
        {"num_layers": ranks * chunks},
        *each("pipeline_model_parallel_size", range(layers // chunks, 0, -1)),
        {"pipeline_schedule": "1f1b", VIRTUAL: None},
        also=STAGES_ON_A_RANK,
    )


def groups_hold_microbatches(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """pp <= group <= microbatches, and a schedule that has groups."""
    p = config.parallel
    ranks = p.pipeline_model_parallel_size
    group = p.microbatch_group_size_per_virtual_pipeline_stage
    if ranks == 1 or group is None:
        return
    off = {GROUP: None}
    also = STAGES_ON_A_RANK
    count = _microbatches(config, world_size)
    if schedule_name(config) != "interleaved":
        yield Finding(
            f"{flag_of(GROUP)} {group} has no effect without --pipeline-schedule interleaved",
            {"pipeline_schedule": "interleaved"},
            off,
            also=also,
        )
    elif group < ranks:
        message = f"{flag_of(GROUP)} {group} is less than --pp {ranks}: ranks would wait"
        yield Finding(message, {GROUP: ranks}, off, also=also)
    elif group > count:
        yield Finding(
            f"{flag_of(GROUP)} {group} is more than the {count} microbatches of a step",
            {GROUP: count},
            off,
            also=(*also, "global_batch_size", "micro_batch_size"),
        )


def _microbatches(config: RunConfig, world_size: int) -> int:
    """Microbatches of a step, m, of a configuration whose batch may not fit the ranks."""
    rows = config.data.micro_batch_size * data_parallel_size(config, world_size)
    return max(1, global_batch(config, world_size) // rows)


def memory_limit_limits(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """--memory-limit-gib is for the choice of a schedule."""
    p = config.parallel
    limit = p.memory_limit_gib
    if limit is None or p.pipeline_schedule == "auto" or p.pipeline_model_parallel_size == 1:
        return
    yield Finding(
        f"--memory-limit-gib {limit:g} has no effect without --pipeline-schedule auto",
        {"pipeline_schedule": "auto"},
        {"memory_limit_gib": None},
    )


def a_schedule_fits_the_memory(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """Some schedule fits --memory-limit-gib, by estimate: what is known once the other rules find
    nothing."""
    p = config.parallel
    t = p.tensor_model_parallel_size
    ranks = p.pipeline_model_parallel_size
    d = config.data
    batch = global_batch(config, world_size)
    sound = (
        1 < ranks <= ranks * config.pipeline.chunks <= config.model.num_layers
        and world_size % (t * ranks) == 0
        and batch % (d.micro_batch_size * data_parallel_size(config, world_size)) == 0
    )
    if p.memory_limit_gib is None or p.pipeline_schedule != "auto" or not sound:
        return
    values: dict[str, Any] = {"global_batch_size": batch}
    if config.model.vocab_size is None:
        with suppress(TokenizerError, OSError):
            values["vocab_size"] = getattr(build_tokenizer(config), "vocab_size", None)
        if values.get("vocab_size") is None:
            return
    found = candidates(with_values(config, values), world_size)
    least = min((one.memory for one in found), default=0)
    if least > memory_limit(config, found):
        needed = -(-least // (GIB / 10)) / 10
        yield Finding(
            f"--memory-limit-gib {p.memory_limit_gib:g} is less than every schedule needs by "
            f"estimate: the least is {needed:g} GiB on a rank",
            {"memory_limit_gib": needed},
            "a layout that divides the model more, or recomputation",
        )


SCHEDULE_RULES: tuple[Rule, ...] = (
    schedule_orders_a_pipeline,
    stages_are_counted_once,
    layers_fill_virtual_stages,
    schedule_takes_its_stages,
    virtual_stages_hold_layers,
    groups_hold_microbatches,
    memory_limit_limits,
)
SCHEDULE_FILE_RULES: tuple[Rule, ...] = (a_schedule_fits_the_memory,)
"""They read the tokenizer's files."""
