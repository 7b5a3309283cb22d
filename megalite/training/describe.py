"""What is printed about a run before it trains: size of the model, kernels, and the dry run."""

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from megalite.config.run import RunConfig
from megalite.data.architectures import DATA_OF
from megalite.kernels import native
from megalite.nn.attention import Attention
from megalite.parallel.collectives import gather_objects
from megalite.parallel.context import ParallelContext
from megalite.training.batches import GlobalBatches
from megalite.training.build import TrainingComponents


def model_line(components: TrainingComponents, context: ParallelContext) -> str:
    """Number of parameters of the whole model and of each stage. Collective over the world."""
    # Count each parameter once: a stage has its copy of a tied embedding, the total has not, since
    # only the first stage's is primary.
    position = context.coordinates
    within_stage = {axis: index for axis, index in position.items() if axis != "pipeline"}
    counted = 0
    held = 0
    for parameter in components.model.parameters():
        spec = parameter.spec
        counted += spec.box.numel * spec.is_primary(position)
        held += spec.box.numel * spec.is_primary(within_stage)

    # Sum over the ranks.
    stages = [0] * context.pipeline.size
    total = 0
    ranks = gather_objects((position["pipeline"], counted, held), context.control)
    for stage, counted_there, held_there in ranks:
        stages[stage] += held_there
        total += counted_there
    line = f"{total:,} parameters"
    if context.pipeline.size > 1:
        line += f"; by stage {', '.join(f'{count:,}' for count in stages)}"
    return line


def kernels_line(components: TrainingComponents, config: RunConfig) -> str:
    """How attention is computed and why, and which kernels there are."""
    modules = components.model.modules()
    attention = next(module for module in modules if isinstance(module, Attention))
    needs_mask = DATA_OF[config.model.architecture].pads or config.data.reset_attention_mask
    backend, reason = attention.backend(attention.qkv.weight, needs_mask)
    line = f"attention: {backend} ({reason}); {native.status()}"
    if config.optimizer.precision == "fp64":
        line += "; fp64 takes PyTorch's operations"
    return line


@dataclass
class _RankReport:
    """What a rank reports of a dry run."""

    layers: str
    hidden_shape: list[int]
    """Of what it sends to the next stage."""
    peak_bytes: int
    loss: float
    parameters: dict[str, list[int]]
    """Shapes by name."""


def dry_run(
    components: TrainingComponents,
    context: ParallelContext,
    batches: GlobalBatches,
    consumed: int,
    log: Callable[[str], None],
) -> None:
    """Run one global batch forward and backward; print loss, time, memory and shapes of each stage.

    `consumed` is the sample that the batch starts at. Changes no weight. Collective over the world.
    """
    began = time.perf_counter()
    loss = components.engine.train_step(*batches.at(consumed)).sum().item()
    for _ in components.optimizer.state():
        pass  # allocated here as by the first real step: the optimizer's state is part of the peak
    seconds = time.perf_counter() - began

    # Gather what every rank has to report.
    model = components.model
    layers = list(model.layers)
    report = _RankReport(
        layers=f"{layers[0]}-{layers[-1]}",
        hidden_shape=list(model.hidden_shape(components.engine.micro_batch_size)),
        peak_bytes=_peak_bytes(context),
        loss=loss,
        parameters={name: list(p.shape) for name, p in model.named_parameters()},
    )
    reports = gather_objects(report, context.control)

    # Print a line for each rank, then the parameters on the first rank of each stage.
    log(f"dry run: {batches.microbatches} microbatches in {seconds:.2f} s")
    for rank, report in enumerate(reports):
        log(_rank_line(rank, report, context))
    for stage, rank in enumerate(context.layout.group_of(0, "pipeline")):
        log(f"parameters of stage {stage} on rank {rank}:")
        for name, shape in reports[rank].parameters.items():
            log(f"  {name} {shape}")

    # Tensor-parallel ranks hold the same loss.
    total = 0.0
    for rank, report in enumerate(reports):
        if context.layout.coordinates(rank)["tensor"] == 0:
            total += report.loss
    log(f"loss {total:.4f}; nothing was saved")


def _peak_bytes(context: ParallelContext) -> int:
    """Most memory that this rank has used: of its GPU, or resident on the host."""
    if context.device.type == "cuda":
        return torch.cuda.max_memory_allocated(context.device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _rank_line(rank: int, report: _RankReport, context: ParallelContext) -> str:
    at = context.layout.coordinates(rank)
    memory = "GPU memory" if context.device.type == "cuda" else "resident memory"
    line = (
        f"rank {rank} (stage {at['pipeline']}, data {at['data']}, tensor {at['tensor']}): "
        f"layers {report.layers}, peak {memory} {report.peak_bytes / 2**20:,.0f} MiB"
    )
    if at["pipeline"] < context.pipeline.size - 1:
        line += f", sends {report.hidden_shape} to the next stage"
    return line
