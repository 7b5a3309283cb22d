"""What a configuration amounts to, by arithmetic: parameters and memory of each stage,
microbatches. Imports no torch.

Parameters are exact. Memory is rough (within some tens of per cent): weights, gradients and
optimizer states, and the activations by the formulas of Korthikanti et al. 2022; not what the
allocator, kernels and communication add.
"""

from dataclasses import dataclass

from megalite.config.rules.finding import data_parallel_size
from megalite.config.run import RunConfig
from megalite.models import cost
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
    element_bytes, parameter_bytes = _bytes_of(config, world_size)
    stages = []
    for stage, layers in enumerate(layers_of_stages(model, stage_count, config.predicted)):
        parameters = _stage_parameters(config, layers, tensor, rows)
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
        state = parameters * parameter_bytes
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
    total = len(layers) * cost.layer_parameters(model, tensor)
    if 0 in layers:
        total += cost.embedding_parameters(model, rows, config.head_cost)
    if model.num_layers - 1 in layers:
        shares_embedding = model.tied and 0 in layers
        total += cost.head_parameters(model, rows, config.head_cost, shares_embedding)
    return total


def _bytes_of(config: RunConfig, world_size: int) -> tuple[int, float]:
    """Bytes of an element of an activation; of a parameter with its gradient, its optimizer states
    and, in half precision, its fp32 master weight. A sharded optimizer divides the last two by the
    data-parallel size."""
    o = config.optimizer
    size = {"fp32": 4, "bf16": 2, "fp16": 2, "fp64": 8}[o.precision]
    states = 2 if o.optimizer == "adam" else int(o.sgd_momentum > 0)
    states += int(size == 2)
    if config.parallel.use_distributed_optimizer:
        states /= data_parallel_size(config, world_size)
    return size, size + max(4, size) * (1 + states)
