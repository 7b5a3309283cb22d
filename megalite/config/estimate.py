"""What a configuration amounts to, by arithmetic: parameters and memory of each stage,
microbatches. Imports no torch.

Parameters are exact. Memory is rough (within some tens of per cent): weights, gradients and
optimizer states, and the activations by the formulas of Korthikanti et al. 2022; not what the
allocator, kernels and communication add.
"""

from dataclasses import dataclass
from math import prod

from megalite.config.rules.finding import data_parallel_size
from megalite.config.run import RunConfig
from megalite.deepspeed import settings
from megalite.models import cost
from megalite.models.shapes import Shapes, decays, elements, stage_shapes
from megalite.optim.treatment import treatment_of
from megalite.pipeline.schedules import peak_in_flight, schedule_named


@dataclass(frozen=True)
class StageEstimate:
    """One rank of a pipeline stage."""

    layers: range
    parameters: int
    """Held by the rank, vocabulary padding included."""
    state_bytes: float
    """Weights, gradients, optimizer states."""
    activation_bytes: float
    """Kept between forward and backward at the fullest moment."""

    @property
    def total_bytes(self) -> float:
        """All of it."""
        return self.state_bytes + self.activation_bytes


def model_parameters(config: RunConfig) -> int:
    """Parameters of the whole model, without vocabulary padding."""
    layers = range(config.model.num_layers)
    rows = config.model.vocab_size or 0
    return elements(stage_shapes(config.model, config.head_cost, layers, rows=rows))


def estimate_stages(config: RunConfig, world_size: int) -> list[StageEstimate]:
    """One rank of every stage of a resolved configuration."""
    model = config.model
    parallel = config.parallel
    tensor = parallel.tensor_model_parallel_size
    stage_count = parallel.pipeline_model_parallel_size
    rows = model.padded_vocabulary(tensor) // tensor
    schedule = schedule_named(parallel.pipeline_schedule)
    element_bytes = _element_bytes(config)
    stages = []
    for stage, layers in enumerate(config.layers_of_stages):
        shapes = stage_shapes(model, config.head_cost, layers, rows=rows, tensor=tensor)
        actions = schedule(stage_count, stage, microbatches(config, world_size))
        activations = cost.activation_bytes(
            model,
            config.recompute,
            micro_batch_size=config.data.micro_batch_size,
            element_bytes=element_bytes,
            layers=len(layers),
            in_flight=peak_in_flight(actions),
            tensor=tensor,
            sequence_parallel=parallel.sequence_parallel,
        )
        if stage == stage_count - 1:
            logits = config.predicted * model.seq_length * config.data.micro_batch_size * rows
            activations += 2 * max(4, element_bytes) * logits
        state = _state_bytes(config, shapes, world_size)
        stages.append(StageEstimate(layers, elements(shapes), state, activations))
    return stages


def microbatches(config: RunConfig, world_size: int) -> int:
    """Microbatches in a step of one data-parallel rank, m, of a resolved configuration."""
    d = config.data
    return d.global_batch_size // (d.micro_batch_size * data_parallel_size(config, world_size))


def _element_bytes(config: RunConfig) -> int:
    """Bytes of a weight and of an element of an activation."""
    return {"fp32": 4, "bf16": 2, "fp16": 2, "fp64": 8}[config.optimizer.precision]


def _state_bytes(config: RunConfig, shapes: Shapes, world_size: int) -> float:
    """Bytes of a rank's parameters with their gradients, what the optimizer keeps of them, and in
    half precision their fp32 master weights. A sharded optimizer divides the last two by the
    data-parallel size."""
    o = config.optimizer
    size = _element_bytes(config)
    if config.deepspeed.deepspeed:
        return elements(shapes) * _deepspeed_bytes(config, size, world_size)
    shards = 1
    if config.parallel.use_distributed_optimizer:
        shards = data_parallel_size(config, world_size)
    total = 0.0
    for name, shape in shapes.items():
        treatment = treatment_of(name, decays(name), o)
        kept = len(o.moments(treatment.rule)) + int(size == 2)
        bytes_each = size
        if not treatment.frozen:
            bytes_each += max(4, size) * (1 + kept / shards)
        total += prod(shape) * bytes_each
    return total


def _deepspeed_bytes(config: RunConfig, weight: int, world_size: int) -> float:
    """Bytes of a parameter with all that DeepSpeed keeps of it on the device: fp32 gradients, an
    fp32 copy and its moments. Stage 1 divides the last two over the data ranks, stage 2 gradients
    too, stage 3 all."""
    given = settings.read(config.deepspeed.deepspeed_config)
    stage = settings.stage_of(given)
    ranks = data_parallel_size(config, world_size)
    gradient = 4
    moments = config.optimizer.moments(config.optimizer.optimizer)
    states = 4 * (1 + len(moments)) / ranks
    if stage >= 2:
        gradient /= ranks
    if stage == 3:
        weight /= ranks
    if settings.offloads(given):
        states = 0
    if settings.offloads(given, "offload_param"):
        weight = 0
    return weight + gradient + states
