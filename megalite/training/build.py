"""From a configuration to the components of a run: groups, model, engine, optimizer."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import torch

from megalite import __version__
from megalite.config.rules.deepspeed import deepspeed_settings
from megalite.config.run import RunConfig, to_flat
from megalite.deepspeed.optimizer import DeepSpeedOptimizer
from megalite.deepspeed.settings import flattened
from megalite.kernels import native
from megalite.models.bert import Bert
from megalite.models.gpt import GPT
from megalite.models.stage import Stage
from megalite.models.stages import Stages
from megalite.nn.settings import LayerSettings
from megalite.optim.optimizer import Optimizer
from megalite.parallel.context import DeviceError, ParallelContext, choose_device
from megalite.parallel.launch import LaunchInfo
from megalite.parallel.layout import ParallelLayout
from megalite.parallel.rendezvous import meet
from megalite.parallel.rng import CounterBasedRng, Rng, RngTracker
from megalite.pipeline.engine import PipelineEngine
from megalite.pipeline.schedules import Pipeline
from megalite.watch.agreement import compare_facts


def build_context(config: RunConfig, launch: LaunchInfo) -> tuple[ParallelContext, str]:
    """Meet the other ranks. Returns the context, and a line that names device, backend and layout.

    Where several ranks of a node compute on the CPU, this also divides its cores among them, with
    `torch.set_num_threads`, unless OMP_NUM_THREADS is set.

    Collective. Raises DeviceError when the configured device or backend is not available here,
    RanksDiffer when ranks were started with different versions or configurations.
    """
    # Choose the layout, the device and the backend.
    parallel = config.parallel
    pipeline = config.pipeline
    layout = ParallelLayout.for_world(
        launch.world_size,
        tensor=parallel.tensor_model_parallel_size,
        pipeline=parallel.pipeline_model_parallel_size,
    )
    device, why = choose_device(parallel.device, launch)
    for key in ("optimizer_backend", "norm_backend"):
        if to_flat(config)[key] == "apex" and device.type != "cuda":
            flag = key.replace("_", "-")
            raise DeviceError(f"--{flag} apex needs a GPU, but this runs on {device.type}: {why}")
    fp16 = config.optimizer.chosen_precision == "fp16"
    if config.deepspeed.deepspeed and fp16 and device.type == "cpu":
        reason = "--precision fp16 with --deepspeed works on GPUs only"
        raise DeviceError(f"{reason}: {why}; use --precision bf16")
    backend = _backend_for(device, why, parallel.distributed_backend, launch.world_size)
    if device.type == "cpu" and launch.local_world_size > 1 and "OMP_NUM_THREADS" not in os.environ:
        # Otherwise every rank would start as many threads as the node has cores.
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // launch.local_world_size))

    # Meet the other ranks, which must be started alike. Where one node lacks the kernels, sums are
    # rounded differently there, and copies of weights would drift apart.
    facts = {
        "megalite": __version__,
        "torch": torch.__version__,
        "kernels": native.status(),
        "world size": launch.world_size,
        **to_flat(config),
    }
    if config.deepspeed.deepspeed:
        for path, value in flattened(deepspeed_settings(config, launch.world_size)):
            facts[f"ds.json {path}"] = value
    minutes = parallel.distributed_timeout_minutes
    store = None
    if launch.world_size > 1:
        store = meet(launch, timedelta(minutes=minutes))
        compare_facts(store, launch.rank, launch.world_size, facts)
    # Muon gathers matrices from all ranks that update parts of them.
    gathers = config.optimizer.optimizer == "muon" and parallel.use_distributed_optimizer
    context = ParallelContext.create(
        layout,
        launch,
        device=device,
        backend=backend,
        timeout_minutes=minutes,
        store=store,
        more_groups=[("tensor", "data")] if gathers else [],
        groups_of_one=config.deepspeed.deepspeed,
        ends_apart=pipeline.rank_of(0) != pipeline.rank_of(pipeline.stages - 1),
        saves_in_thread=config.checkpoint.async_save,
    )
    via = "one process, no launcher"
    if launch.world_size > 1:
        via = f"{backend}, launched by {launch.source}"
    return context, f"{launch.world_size} rank(s) on {device.type} ({why}); {via}; layout {layout}"


def _backend_for(device: torch.device, why: str, wanted: str, world_size: int) -> str:
    """The backend of --distributed-backend `wanted`: nccl or gloo. Raises DeviceError when it
    cannot communicate tensors of `device`, which was chosen because of `why`."""
    on_gpu = device.type == "cuda"
    if wanted == "auto":
        return "nccl" if on_gpu else "gloo"
    if wanted == "nccl" and not on_gpu:
        raise DeviceError(
            f"--distributed-backend nccl works between GPUs: {why}; use --distributed-backend gloo"
        )
    if wanted == "gloo" and on_gpu and world_size > 1:
        raise DeviceError(
            "--distributed-backend gloo cannot send tensors of GPUs between stages; use nccl"
        )
    return wanted


@dataclass
class TrainingComponents:
    """What trains a model on this rank: built together, since each needs the one before."""

    model: Stages
    rng: Rng
    engine: PipelineEngine
    optimizer: Optimizer | DeepSpeedOptimizer


def build_model(config: RunConfig, context: ParallelContext, rng: Rng) -> Stages:
    """This rank's stages of the model, with their initial weights; the whole model as one stage
    where one rank is alone, whatever pipeline the configuration has."""
    pipeline = Pipeline()
    layers = [range(config.model.num_layers)]
    if context.pipeline.size > 1:
        pipeline = config.pipeline
        layers = config.layers_of_stages
    settings = LayerSettings(
        config.model,
        context,
        rng,
        dtype=getattr(torch, config.optimizer.dtype),
        sequence_parallel=config.parallel.sequence_parallel,
        recompute=config.recompute,
    )
    make_stage = STAGE_OF[config.model.architecture]
    stages: dict[int, Stage] = {}
    for number in pipeline.stages_of(context.pipeline.rank):
        stages[number] = make_stage(config, settings, layers[number], stages.get(0))
    return Stages(stages)


def _gpt(config: RunConfig, settings: LayerSettings, layers: range, first: Stage | None) -> Stage:
    return GPT(settings, layers, config.training.seed, first)


def _bert(config: RunConfig, settings: LayerSettings, layers: range, first: Stage | None) -> Stage:
    return Bert(settings, layers, config.training.seed, first, pair=config.pair_head)


STAGE_OF: dict[str, Callable[..., Stage]] = {"gpt": _gpt, "bert": _bert}
"""What makes a stage of a model, by architecture."""


def build_components(
    config: RunConfig, context: ParallelContext, build_model: Callable = build_model
) -> TrainingComponents:
    """Model, engine and optimizer of a resolved configuration."""
    seed = config.training.seed
    if config.training.rng_scheme == "global":
        rng = CounterBasedRng.for_seed(seed)
    else:
        rng = RngTracker.for_rank(seed, context)
    model = build_model(config, context, rng)
    engine = PipelineEngine(model, context, config.data.micro_batch_size, config.parallel)
    if config.deepspeed.deepspeed:
        optimizer = DeepSpeedOptimizer(
            model.stages[0],
            context,
            config.optimizer,
            schedule=config.schedule(),
            settings=deepspeed_settings(config, context.world_size),
        )
        engine.run_stage = lambda stage, x, batch: optimizer.engine(x, batch)
        engine.backward_of_loss = optimizer.backward
    else:
        optimizer = Optimizer(
            model.parameters_by_name,
            context,
            config.optimizer,
            schedule=config.schedule(),
            parallel=config.parallel,
        )
        engine.weight_gradients = optimizer.gradients.weight_gradients
    engine.before_step = optimizer.begin_step
    engine.loss_scale = lambda: optimizer.loss_factor
    if config.parallel.overlap_param_gather:
        _wait_in_forward(model, optimizer)
    return TrainingComponents(model, rng, engine, optimizer)


def _wait_in_forward(model: Stages, optimizer: Optimizer) -> None:
    """Let a forward wait for parameters that are being gathered as it enters their module, and for
    the rest at the final norm: the output layer reads weights of other modules."""
    for stage in model.stages:
        for module in [*stage.layers.values(), *stage.children()]:
            names = None
            if module is not getattr(stage, "final_norm", None):
                trained = [p for p in module.parameters() if p.requires_grad]
                names = tuple(parameter.spec.name for parameter in trained)
            module.register_forward_pre_hook(partial(_wait, optimizer, names))


def _wait(optimizer: Optimizer, names: tuple[str, ...] | None, *unused: object) -> None:
    optimizer.wait_for_parameters(names)
