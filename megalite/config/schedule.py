"""Which pipeline schedule a configuration has, with how many stages on a rank. Imports no torch."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from megalite.config.estimate import (
    element_bytes,
    estimate_ranks,
    flops_by_action,
    microbatches,
    work_of_ranks,
)
from megalite.config.run import RunConfig
from megalite.parallel.config import ParallelConfig
from megalite.pipeline.schedules import SCHEDULES, Action, pipeline_of, training_orders
from megalite.pipeline.simulate import simulate

TRIED = {"1f1b": (1,), "interleaved": (2, 3, 4, 6, 8), "zb-h1": (1,), "zb-v": (2,)}
"""Schedules that `auto` tries, the simplest first, and the numbers of stages on a rank."""
FLOPS_PER_BYTE = 8000.0
"""What a GPU computes while a link sends a byte: 400 TFLOP/s, and 50 GB/s to another node."""
MEMORY_OVER_DEFAULT = 1.1
"""Memory that `auto` may use without a limit, as a multiple of what the default schedule takes."""
SIMULATED = 4
"""Microbatches that `auto` simulates, as a multiple of the ranks: after that, each takes as long as
the one before."""
GIB = 2**30
STAGES_ON_A_RANK = (
    "num_virtual_stages_per_pipeline_rank",
    "num_layers_per_virtual_pipeline_stage",
    "pipeline_schedule",
)
"""Fields that say how many stages a rank holds."""


@dataclass(frozen=True)
class Candidate:
    """A schedule that `auto` considers."""

    name: str
    chunks: int
    """Stages on a rank."""
    flops: float
    """Length of a step, in FLOPs of a stage's tensor-parallel ranks for one sequence at a time."""
    memory: float
    """Bytes of the fullest rank, by estimate."""

    def __str__(self) -> str:
        stages = f" v={self.chunks}" if self.name == "interleaved" else ""
        return self.name + stages


def schedule_fields(config: RunConfig, world_size: int) -> dict[str, Any]:
    """The fields of the schedule of a configuration, with what follows from others filled in.

    The schedule may not fit the pipeline: rules report that. With `auto`, the other fields of the
    configuration must be filled in already.
    """
    chunks = config.pipeline.chunks
    name = schedule_name(config)
    if name == "auto":
        found = candidates(config, world_size)
        best = fastest(found, memory_limit(config, found))
        name, chunks = best.name, best.chunks
    return {
        "pipeline_schedule": name,
        "num_virtual_stages_per_pipeline_rank": chunks,
        "num_layers_per_virtual_pipeline_stage": None,
        "memory_limit_gib": None,
    }


def schedule_name(config: RunConfig) -> str:
    """The schedule: where none is given, 1F1B, or interleaved with several stages on a rank."""
    chunks = config.given_chunks
    return replace(config.parallel, num_virtual_stages_per_pipeline_rank=chunks).schedule


@lru_cache(maxsize=4)
def candidates(config: RunConfig, world_size: int) -> tuple[Candidate, ...]:
    """What `auto` may choose from; 1F1B only where there is one rank. gpipe is no faster than 1F1B,
    and keeps more.

    The first is the default schedule: 1F1B, or interleaved where the flags ask for several stages
    on a rank.
    """
    found = []
    for parallel in _layouts(config):
        one = replace(config, parallel=parallel)
        memory = max(rank.total_bytes for rank in estimate_ranks(one, world_size))
        found.append(
            Candidate(
                parallel.pipeline_schedule,
                parallel.num_virtual_stages_per_pipeline_rank,
                _step_flops(one, microbatches(one, world_size)),
                memory,
            )
        )
    return tuple(found)


def _layouts(config: RunConfig) -> Iterator[ParallelConfig]:
    """The configuration's layout with each schedule that fits the layers and the flags."""
    p = config.parallel.pipeline_model_parallel_size
    given = config.given_chunks
    most = config.model.num_layers // p
    if config.recompute.granularity == "full":
        # A stage must hold the layers that are recomputed together.
        most //= config.recompute.recompute_num_layers
    for name, tried in TRIED.items():
        if p == 1:
            tried = (1,) if name == "1f1b" else ()
        elif given is not None:
            tried = (given,) if given in SCHEDULES[name].chunks else ()
        for chunks in tried:
            parallel = replace(
                config.parallel,
                pipeline_schedule=name,
                num_virtual_stages_per_pipeline_rank=chunks,
                num_layers_per_virtual_pipeline_stage=None,
            )
            fits = given is not None or chunks == 1 or chunks <= most
            if fits and _can_divide(replace(config, parallel=parallel)):
                yield parallel


def _can_divide(config: RunConfig) -> bool:
    """Whether the layers can be divided as the flags say."""
    try:
        return bool(config.layers_of_stages)
    except ValueError:
        return False


def _step_flops(config: RunConfig, count: int) -> float:
    """The simulated length of a step of `count` microbatches, as `Candidate.flops`."""
    pipeline = pipeline_of(config.parallel)
    flops = flops_by_action(config)
    model = config.model
    tensor = config.parallel.tensor_model_parallel_size
    # A sequence's FLOPs are divided over the tensor-parallel ranks; its hidden states may be.
    message = model.seq_length * model.hidden_size * element_bytes(config) * FLOPS_PER_BYTE * tensor
    if config.parallel.sequence_parallel:
        message /= tensor
    simulated = min(count, SIMULATED * pipeline.ranks)

    def of_action(action: Action) -> float:
        return flops[action.stage][action.kind]

    orders = training_orders(config.parallel, simulated)
    busiest = max(work_of_ranks(config))
    return simulate(orders, pipeline, of_action, message).seconds + (count - simulated) * busiest


def memory_limit(config: RunConfig, found: tuple[Candidate, ...]) -> float:
    """Bytes of a rank that `auto` may use. found: what it may choose from."""
    given = config.parallel.memory_limit_gib
    return MEMORY_OVER_DEFAULT * found[0].memory if given is None else given * GIB


def fastest(found: tuple[Candidate, ...], limit: float) -> Candidate:
    """The fastest candidate within the limit, of equal ones the first; the smallest, where none
    is."""
    best = None
    for candidate in found:
        if candidate.memory <= limit and (best is None or candidate.flops < best.flops):
            best = candidate
    return best or min(found, key=lambda candidate: candidate.memory)


def why_chosen(asked: RunConfig, resolved: RunConfig, world_size: int) -> str:
    """What `auto` chose from, and how long a step takes with each, in one line.

    asked: the configuration with `auto`. resolved: the one that it became.
    """
    parallel = resolved.parallel
    flags = {key: getattr(asked.parallel, key) for key in (*STAGES_ON_A_RANK, "memory_limit_gib")}
    before = replace(resolved, parallel=replace(parallel, **flags))
    found = candidates(before, world_size)
    limit = memory_limit(before, found)
    best = fastest(found, limit)
    words = []
    for candidate in found:
        length = candidate.flops / best.flops
        words.append(f"{candidate} {length:.3f} ({candidate.memory / GIB:.3g} GiB)")
    return (
        f"--pipeline-schedule auto: {best} is the fastest within {limit / GIB:.3g} GiB a rank; "
        f"time of a step by simulation (memory by estimate): {', '.join(words)}"
    )
