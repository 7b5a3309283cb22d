"""Which pipeline schedule a configuration has, with how many stages on a rank. Imports no torch."""

from dataclasses import replace
from typing import Any

from megalite.config.run import RunConfig
from megalite.pipeline.schedules import SCHEDULES


def schedule_fields(config: RunConfig, world_size: int) -> dict[str, Any]:
    """The fields of the schedule, with what follows from others filled in.

    The schedule may not fit the pipeline: rules report that.
    """
    p = config.parallel
    ranks = p.pipeline_model_parallel_size
    chunks = p.num_virtual_stages_per_pipeline_rank
    layers = p.num_layers_per_virtual_pipeline_stage
    if chunks is None and layers is not None:
        chunks = max(1, config.model.num_layers // (layers * ranks))
    name = replace(p, num_virtual_stages_per_pipeline_rank=chunks).schedule
    return {
        "pipeline_schedule": name,
        "num_virtual_stages_per_pipeline_rank": chunks or SCHEDULES[name].chunks.start,
        "num_layers_per_virtual_pipeline_stage": None,
    }
