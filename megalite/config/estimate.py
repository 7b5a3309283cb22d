"""What a configuration amounts to, by arithmetic: parameters and memory of each stage,
microbatches. Imports no torch.

Parameters are exact. Memory is rough (within some tens of per cent): weights, gradients and
optimizer states, and the activations by the formulas of Korthikanti et al. 2022; not what the
allocator, kernels and communication add.
"""

from dataclasses import dataclass

from megalite.config.rules.finding import data_parallel_size
from megalite.config.run import RunConfig
from megalite.models.cost import (
    activation_bytes,
    embedding_parameters,
    head_parameters,
    layer_parameters,
)
from megalite.pipeline.partition import layers_of_stages
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
    return _stage_parameters(config, layers, tensor=1, rows=config.model.vocab_size or 0)


def estimate_stages(config: RunConfig, world_size: int) -> list[StageEstimate]:
    """One rank of every stage of a resolved configuration."""
    model = config.model
    parallel = config.parallel
    tensor = parallel.tensor_model_parallel_size
    stage_count = parallel.pipeline_model_parallel_size
    rows = model.padded_vocabulary(tensor) // tensor
    schedule = schedule_named(parallel.pipeline_schedule)
    stages = []
    for stage, layers in enumerate(layers_of_stages(model, stage_count, config.predicted)):
        parameters = _stage_parameters(config, layers, tensor, rows)
        actions = schedule(stage_count, stage, microbatches(config, world_size))
        activations = activation_bytes(
            model,
            config.recompute,
            micro_batch_size=config.data.micro_batch_size,
            element_bytes=_element_bytes(config),
            layers=len(layers),
            in_flight=peak_in_flight(actions),
            tensor=tensor,
            sequence_parallel=parallel.sequence_parallel,
        )
        if stage == stage_count - 1:
            logits = config.predicted * model.seq_length * config.data.micro_batch_size * rows
            activations += 2 * max(4, _element_bytes(config)) * logits
        data = data_parallel_size(config, world_size)
        state = parameters * _bytes_per_parameter(config, data)
        stages.append(StageEstimate(layers, parameters, state, activations))
    return stages


def microbatches(config: RunConfig, world_size: int) -> int:
    """Microbatches in a step of one data-parallel rank, m, of a resolved configuration."""
    d = config.data
    return d.global_batch_size // (d.micro_batch_size * data_parallel_size(config, world_size))


def _stage_parameters(config: RunConfig, layers: range, tensor: int, rows: int) -> int:
    """Parameters of one of `tensor` ranks of the stage that holds these layers and `rows` rows of
    the vocabulary."""
    model = config.model
    head = config.head_cost
    is_first = 0 in layers
    total = len(layers) * layer_parameters(model, tensor)
    if is_first:
        total += embedding_parameters(model, rows, head)
    if model.num_layers - 1 in layers:
        shares_embedding = model.tied and is_first
        total += head_parameters(model, rows, head, shares_embedding)
    return total


def _element_bytes(config: RunConfig) -> int:
    return {"fp32": 4, "bf16": 2, "fp16": 2, "fp64": 8}[config.optimizer.precision]


def _bytes_per_parameter(config: RunConfig, data: int) -> float:
    """Weight, gradient, optimizer states; in half precision also the fp32 master weight. A sharded
    optimizer divides master and states by the `data` ranks."""
    optimizer = config.optimizer
    size = _element_bytes(config)
    wide = max(4, size)
    states = 2 if optimizer.optimizer == "adam" else int(optimizer.sgd_momentum > 0)
    states += int(size == 2)
    shards = data if config.parallel.use_distributed_optimizer else 1
    return size + wide * (1 + states / shards)
