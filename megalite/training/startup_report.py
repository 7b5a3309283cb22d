"""What is printed about a run before it trains: size of the model, kernels, and the dry run."""

import resource
import time

import torch

from megalite.config.run import RunConfig
from megalite.data.architectures import DATA_OF
from megalite.kernels import native
from megalite.nn.attention import Attention
from megalite.optim.apex_adam import adam_backend
from megalite.parallel.collectives import gather_objects
from megalite.training.batches import GlobalBatches
from megalite.training.build import TrainingComponents
from megalite.training.output import Log


def model_line(components: TrainingComponents) -> str:
    """Number of parameters of the whole model and of each rank of a pipeline. Collective over the
    world."""
    # Count each parameter once: the last stage may have a copy of a tied embedding, the total has
    # not, since only the first stage's is primary.
    context = components.model.context
    position = context.coordinates
    within_stage = position | {"pipeline": 0}
    counted = 0
    trained = 0
    held = 0
    for parameter in components.model.parameters_by_name.values():
        spec = parameter.spec
        counted += spec.box.numel * spec.is_primary(position)
        trained += spec.box.numel * spec.is_primary(position) * parameter.requires_grad
        held += spec.box.numel * spec.is_primary(within_stage)

    # Sum over the ranks.
    stages = [0] * context.pipeline.size
    total = 0
    total_trained = 0
    ranks = gather_objects((position["pipeline"], counted, trained, held), context.control)
    for stage, counted_there, trained_there, held_there in ranks:
        stages[stage] += held_there
        total += counted_there
        total_trained += trained_there
    line = f"{total:,} parameters"
    if total_trained < total:
        line += f", of which {total - total_trained:,} are frozen"
    if context.pipeline.size > 1:
        per = "rank of the pipeline" if len(components.model.stages) > 1 else "stage"
        line += f"; by {per} {', '.join(f'{count:,}' for count in stages)}"
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
    device = components.model.context.device
    if config.model.norm_backend != "auto":
        line += f"; norms: {config.model.norm_backend} (--norm-backend)"
    chosen = device.type == "cuda" or config.optimizer.optimizer_backend != "auto"
    own = not config.deepspeed.deepspeed
    if own and chosen and "adam" in components.optimizer.inner:
        adam, reason = adam_backend(config.optimizer, device)
        line += f"; AdamW: {adam} ({reason})"
    return line


def dry_run(parts: TrainingComponents, batches: GlobalBatches, consumed: int, log: Log) -> None:
    """Run one global batch forward and backward; print loss, time, memory and shapes of each stage.

    `consumed` is the sample that the batch starts at. Changes no weight. Collective over the world.
    """
    began = time.perf_counter()
    microbatches, weights = batches.at(consumed)
    loss = parts.engine.train_step(microbatches, weights).sum().item()
    parts.optimizer.allocate_state()  # as the first step would: it is part of the peak memory
    seconds = time.perf_counter() - began

    # Gather what every rank has to report.
    model = parts.model
    context = model.context
    shapes = [(name, list(p.shape)) for name, p in model.parameters_by_name.items()]
    reports = gather_objects((_rank_line(parts), shapes, loss), context.control)

    # Print a line for each rank, then the parameters on the first rank of each stage.
    log(f"dry run: {len(microbatches)} microbatches in {seconds:.2f} s")
    for line, _, _ in reports:
        log(line)
    for position, rank in enumerate(context.layout.group_of(0, "pipeline")):
        stages = parts.engine.pipeline.stages_of(position)
        log(f"parameters of stage {', '.join(map(str, stages))} on rank {rank}:")
        for name, shape in reports[rank][1]:
            log(f"  {name} {shape}")

    # Tensor-parallel ranks hold the same loss.
    total = 0.0
    for rank, (_, _, loss) in enumerate(reports):
        if context.layout.coordinates(rank)["tensor"] == 0:
            total += loss
    log(f"loss {total:.4f}; nothing was saved")


def _rank_line(components: TrainingComponents) -> str:
    """This rank's position, its layers, the most memory it has used, and what it sends."""
    model = components.model
    context = model.context
    at = context.coordinates
    kind = "resident"
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if context.device.type == "cuda":
        kind = "GPU"
        peak_bytes = torch.cuda.max_memory_allocated(context.device)
    layers = [f"{stage.numbers[0]}-{stage.numbers[-1]}" for stage in model.stages]
    numbers = ", ".join(map(str, model.by_number))
    line = (
        f"rank {context.rank} "
        f"(stage {numbers}, data {at['data']}, tensor {at['tensor']}): "
        f"layers {', '.join(layers)}, peak {kind} memory {peak_bytes / 2**20:,.0f} MiB"
    )
    if context.pipeline.rank < context.pipeline.size - 1 or len(model.stages) > 1:
        shape = list(model.hidden_shape(components.engine.micro_batch_size))
        line += f", sends {shape} to the next stage"
    return line
