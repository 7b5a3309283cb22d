"""What a configuration amounts to, by arithmetic: parameters and memory of each rank of a
pipeline, microbatches. Imports no torch.

Parameters are exact. Memory is rough (within some tens of per cent): weights, gradients and
optimizer states, and the activations by the formulas of Korthikanti et al. 2022; not what the
allocator, kernels and communication add.
"""

from dataclasses import dataclass, replace
from math import prod

from megalite.config.rules.finding import data_parallel_size
from megalite.config.run import RunConfig
from megalite.deepspeed import settings
from megalite.models import cost
from megalite.models.shapes import Shapes, decays, elements, stage_shapes
from megalite.nn.config import RecomputeConfig
from megalite.optim.treatment import treatment_of
from megalite.pipeline.schedules import (
    BACKWARD,
    FORWARD,
    INPUT,
    WEIGHT,
    Action,
    peak_in_flight,
    pipeline_of,
    training_orders,
)


@dataclass(frozen=True)
class RankEstimate:
    """One rank of each pipeline rank's group."""

    stages: dict[int, range]
    """The layers of each stage that it holds, by the stage's number in the model."""
    parameters: int
    """Held by the rank, vocabulary padding included. A tied embedding counts once, also where the
    rank holds the first stage and the last."""
    state_bytes: float
    """Weights, gradients, optimizer states."""
    activation_bytes: float
    """Kept between forward and backward at the fullest moment."""
    in_flight: int
    """Microbatches that its stages hold activations of at that moment: each counts once for each
    stage."""

    @property
    def total_bytes(self) -> float:
        """All of it."""
        return self.state_bytes + self.activation_bytes


def model_parameters(config: RunConfig) -> int:
    """Parameters of the whole model, without vocabulary padding."""
    layers = range(config.model.num_layers)
    rows = config.model.vocab_size or 0
    return elements(stage_shapes(config.model, config.head_cost, layers, rows=rows))


def estimate_ranks(config: RunConfig, world_size: int) -> list[RankEstimate]:
    """A rank of each pipeline rank, of a resolved configuration."""
    parallel = config.parallel
    tensor = parallel.tensor_model_parallel_size
    rows = config.model.padded_vocabulary(tensor) // tensor
    pipeline = pipeline_of(parallel)
    orders = training_orders(parallel, microbatches(config, world_size))
    layers = config.layers_of_stages
    ranks = []
    for rank, order in enumerate(orders):
        shapes: Shapes = {}
        stages = {}
        activations = 0.0
        recomputed = 0.0
        in_flight = peak_in_flight(order)
        deferred = _most_deferred(order)
        for stage in pipeline.stages_of(rank):
            count = len(layers[stage])
            stages[stage] = layers[stage]
            shapes |= stage_shapes(
                config.model, config.head_cost, layers[stage], rows=rows, tensor=tensor
            )
            # Of none in flight: the layers that are being computed again, of one stage at a time.
            again = _activation_bytes(config, count, 0)
            recomputed = max(recomputed, again)
            activations += _activation_bytes(config, count, in_flight.get(stage, 0)) - again
            if config.recompute.granularity == "full" and stage in deferred:
                # What was computed again is kept for the weight gradients.
                plain = replace(config, recompute=RecomputeConfig())
                activations += _activation_bytes(plain, count, deferred[stage])
            if stage == pipeline.stages - 1:
                d = config.data
                logits = config.predicted * config.model.seq_length * d.micro_batch_size * rows
                activations += 2 * max(4, element_bytes(config)) * logits
        activations += recomputed
        state = _state_bytes(config, shapes, world_size)
        ranks.append(
            RankEstimate(stages, elements(shapes), state, activations, sum(in_flight.values()))
        )
    return ranks


def flops_by_action(config: RunConfig) -> list[dict[str, float]]:
    """FLOPs of one sequence on each stage of a resolved configuration, by the kind of an action."""
    stages = pipeline_of(config.parallel).stages
    found = []
    for stage, layers in enumerate(config.layers_of_stages):
        flops = cost.pass_flops(
            config.model,
            config.head_cost,
            config.recompute,
            layers=len(layers),
            is_last=stage == stages - 1,
        )
        found.append(flops | {BACKWARD: flops[INPUT] + flops[WEIGHT]})
    return found


def work_of_ranks(config: RunConfig) -> list[float]:
    """FLOPs of the forward and backward of one sequence on each pipeline rank of a resolved
    configuration."""
    pipeline = config.pipeline
    work = [0.0] * pipeline.ranks
    for stage, flops in enumerate(flops_by_action(config)):
        work[pipeline.rank_of(stage)] += flops[FORWARD] + flops[BACKWARD]
    return work


def microbatches(config: RunConfig, world_size: int) -> int:
    """Microbatches in a step of one data-parallel rank, m, of a resolved configuration."""
    d = config.data
    return d.global_batch_size // (d.micro_batch_size * data_parallel_size(config, world_size))


def _activation_bytes(config: RunConfig, layers: int, in_flight: int) -> float:
    """Bytes of activations that one rank keeps of a stage for this many microbatches."""
    return cost.activation_bytes(
        config.model,
        config.recompute,
        micro_batch_size=config.data.micro_batch_size,
        element_bytes=element_bytes(config),
        layers=layers,
        in_flight=in_flight,
        tensor=config.parallel.tensor_model_parallel_size,
        sequence_parallel=config.parallel.sequence_parallel,
    )


def _most_deferred(order: list[Action]) -> dict[int, int]:
    """The most microbatches of each stage whose weight gradients wait after the rest of their
    backward; {} where the schedule does not divide backwards."""
    waiting: dict[int, int] = {}
    most: dict[int, int] = {}
    for action in order:
        if action.kind in (INPUT, WEIGHT):
            change = 1 if action.kind == INPUT else -1
            waiting[action.stage] = waiting.get(action.stage, 0) + change
            most[action.stage] = max(most.get(action.stage, 0), waiting[action.stage])
    return most


def element_bytes(config: RunConfig) -> int:
    """Bytes of a weight and of an element of an activation."""
    return {"fp32": 4, "bf16": 2, "fp16": 2, "fp64": 8}[config.optimizer.chosen_precision]


def _state_bytes(config: RunConfig, shapes: Shapes, world_size: int) -> float:
    """Bytes of a rank's parameters with their gradients, what the optimizer keeps of them, and in
    half precision their fp32 master weights. A sharded optimizer divides the last two by the
    data-parallel size."""
    o = config.optimizer
    size = element_bytes(config)
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
