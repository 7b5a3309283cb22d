"""What a training run must keep to go on to the bit, as pieces of a checkpoint."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch

from megalite import __version__
from megalite.checkpoint.fence import Lease
from megalite.checkpoint.folder import CheckpointError
from megalite.checkpoint.format import Shard
from megalite.checkpoint.load import Checkpoint
from megalite.checkpoint.save import write
from megalite.config.run import RunConfig, keys_where, to_flat
from megalite.config.yaml_file import config_of_checkpoint, to_yaml
from megalite.data.sources import DataState
from megalite.parallel.context import ParallelContext
from megalite.training.build import TrainingComponents

RNG = "rng."
OPTIMIZER = "optimizer."


@dataclass
class Progress:
    """Where a run stands. Global counters only: no layout, no rank."""

    iteration: int = 0
    """Optimizer steps done."""
    consumed_samples: int = 0
    """Training sequences used, which is also the position in the data."""
    data: DataState | None = None
    """The training data and what was used of each source. None: not known yet."""
    notes: list[str] = field(default_factory=list)
    """What a reader of the log should know about how this state came about."""


def _piece(parameter: torch.nn.Parameter, stored_name: str, tensor: torch.Tensor) -> Shard:
    """The part of `tensor`, shaped like the parameter, that belongs to this rank's box."""
    spec = parameter.spec
    return Shard(stored_name, spec.real(tensor.detach()), spec.global_shape, spec.box)


def _owned(parts: TrainingComponents, context: ParallelContext) -> Iterator[Shard]:
    """The shards of model and optimizer that this rank writes: each is written once, by its primary owner."""
    parameters = parts.model.parameters_by_name
    position = context.coordinates
    owned = {name for name, p in parameters.items() if p.spec.is_primary(position)}
    for name, parameter in parameters.items():
        if name in owned:
            yield _piece(parameter, name, parameter)
    for kind, name, tensor in parts.optimizer.state():
        if name in owned:
            yield _piece(parameters[name], f"{OPTIMIZER}{kind}.{name}", tensor)


def save_state(
    parts: TrainingComponents,
    progress: Progress,
    config: RunConfig,
    context: ParallelContext,
    lease: Lease | None = None,
) -> None:
    """Write a checkpoint of the run to --save. Collective; raises CheckpointError on every rank when any rank fails."""
    state = {
        "iteration": progress.iteration,
        "consumed_samples": progress.consumed_samples,
        "optimizer": config.optimizer.optimizer,
        "optimizer_steps": parts.optimizer.steps,
        "data": progress.data.to_json() if progress.data else None,
        "seed": config.training.seed,
        "rng_scheme": config.training.rng_scheme,
        "layout": _layout(context),
        "device": context.device.type,
        "megalite": __version__,
        "torch": torch.__version__,
    }
    streams = {RNG + name: value for name, value in parts.rng.states().items()}
    checkpoint = config.checkpoint
    write(
        checkpoint.save,
        progress.iteration,
        _owned(parts, context),
        streams,
        state,
        to_yaml(config),
        context.control,
        checkpoint.keep_last,
        lease,
    )


def load_weights(checkpoint: Checkpoint, parameters: dict[str, torch.nn.Parameter]) -> None:
    """Read a model's parameters, or some of them, by name into this rank's boxes, whatever the layout that wrote them:
    from the fp32 master weights where there are any and the model is not bf16 itself. Raises CheckpointError listing
    all that does not fit."""
    pieces = []
    for name, parameter in parameters.items():
        stored = _best_source(checkpoint, name) if parameter.dtype != torch.bfloat16 else name
        pieces.append(_piece(parameter, stored, parameter))
    _read(checkpoint, pieces)


def _best_source(checkpoint: Checkpoint, name: str) -> str:
    master = f"{OPTIMIZER}master.{name}"
    return master if master in checkpoint.names else name


def _load_optimizer(checkpoint: Checkpoint, parts: TrainingComponents, config: RunConfig) -> None:
    stored = checkpoint.state["optimizer"]
    if stored != config.optimizer.optimizer:
        raise CheckpointError(
            f"{checkpoint.folder} holds the state of --optimizer {stored}, this run uses {config.optimizer.optimizer}; "
            f"use --optimizer {stored}, or --no-load-optim to start the optimizer anew"
        )
    pieces = []
    for kind, name, tensor in parts.optimizer.state():
        source = _best_source(checkpoint, name) if kind == "master" else f"{OPTIMIZER}{kind}.{name}"
        pieces.append(_piece(parts.optimizer.parameters[name], source, tensor))
    _read(checkpoint, pieces)
    parts.optimizer.set_steps(checkpoint.state["optimizer_steps"])


def _load_master(checkpoint: Checkpoint, parts: TrainingComponents) -> None:
    """The master weights of a bf16 model from the best that is stored, which may be finer than bf16."""
    if parts.optimizer.keeps_master:
        parameters = parts.optimizer.parameters
        masters = parts.optimizer.master.items()
        _read(
            checkpoint,
            [_piece(parameters[name], _best_source(checkpoint, name), m) for name, m in masters],
        )


def _read(checkpoint: Checkpoint, pieces: list[Shard]) -> None:
    checkpoint.check(pieces)
    for piece in pieces:
        checkpoint.read_into(piece)


def load_state(parts: TrainingComponents, config: RunConfig, context: ParallelContext) -> Progress:
    """Continue from --load: weights, optimizer, random streams and position in the data, as the flags say.

    Any layout reads any layout's checkpoint. The streams of --rng-scheme megatron belong to ranks, so under another
    layout they start from the seed; a note says so. Raises CheckpointError when something wanted is not there.
    """
    options = config.checkpoint
    with Checkpoint.open(options.load, options.ckpt_step) as checkpoint:
        load_weights(checkpoint, parts.model.parameters_by_name)
        if options.finetune or options.no_load_optim:
            _load_master(checkpoint, parts)
        else:
            _load_optimizer(checkpoint, parts, config)
        if options.finetune:
            return Progress(
                notes=[
                    f"weights from {checkpoint.folder}; everything else starts anew (--finetune)"
                ]
            )
        state = checkpoint.state
        data = (
            DataState.from_json(state["data"]) if state.get("data") else None
        )  # older checkpoints do not tell
        progress = Progress(state["iteration"], state["consumed_samples"], data)
        progress.notes.append(f"resumed from {checkpoint.folder} at iteration {progress.iteration}")
        batch = config.data.global_batch_size
        if (
            config.training.train_samples
            and progress.consumed_samples != progress.iteration * batch
        ):
            done = (
                progress.iteration
                + (config.training.train_samples - progress.consumed_samples) // batch
            )
            raise CheckpointError(
                f"{checkpoint.folder} has used {progress.consumed_samples} samples in {progress.iteration} iterations, "
                f"not --global-batch-size {batch} in each, so --train-samples {config.training.train_samples} is no "
                f"whole number of iterations: use --train-iters {done} in its place"
            )
        progress.notes += _changes(checkpoint, config)
        _restore_streams(checkpoint, parts, config, context, progress)
    return progress


def settle_data(progress: Progress, now: DataState, allow_change: bool) -> None:
    """Let the run go on with the data `now` from where `progress` stands. A change is noted, and kept in the state.

    Raises CheckpointError when the data is not the checkpoint's and --allow-data-change is not given.
    """
    if progress.data is None:
        if progress.consumed_samples:
            progress.notes.append(
                "the checkpoint does not tell which data it was made with: it is not compared"
            )
        progress.data = replace(now, start=0)
        return
    differences = progress.data.differences(now)
    if not differences:
        progress.data = progress.data.with_prefixes_of(now)
    elif allow_change:
        progress.data = progress.data.followed_by(now, progress.consumed_samples)
        used = ", ".join(
            f"{source.prefix} from sample {source.consumed}" for source in progress.data.sources
        )
        progress.notes.append(
            f"the training data changes here: {'; '.join(differences)}; now {used}"
        )
    else:
        raise CheckpointError(data_changed(differences))


def data_changed(differences: list[str]) -> str:
    """What is said when the data is not the checkpoint's."""
    return f"the training data is not what the checkpoint was made with: {'; '.join(differences)}"


def _changes(checkpoint: Checkpoint, config: RunConfig) -> list[str]:
    """A note for what the checkpoint was made with and this run is not, since the numbers will go on differently."""
    before = to_flat(config_of_checkpoint(checkpoint.config_yaml))
    now = to_flat(config)
    changed = []
    for key in keys_where(lambda field: field.changes_numbers):
        if before[key] != now[key]:
            changed.append(f"{key} {before[key]} -> {now[key]}")
    return [f"changed since the checkpoint was made: {', '.join(changed)}"] if changed else []


def _restore_streams(
    checkpoint,
    parts: TrainingComponents,
    config: RunConfig,
    context: ParallelContext,
    progress: Progress,
) -> None:
    """Put the random streams where the checkpoint's run had them, if both runs have streams and the layout is its."""
    scheme = config.training.rng_scheme
    stored = checkpoint.state.get("rng_scheme", "megatron")  # the only one before it was noted down
    if stored != scheme:
        progress.notes.append(
            f"the checkpoint was made with --rng-scheme {stored}, this run has {scheme}: from here on, dropout drops "
            "other elements than the run that made it would have dropped"
        )
        return
    if scheme == "global" or config.checkpoint.no_load_rng:
        return
    if (checkpoint.state["layout"], checkpoint.state["device"]) != (
        _layout(context),
        context.device.type,
    ):
        progress.notes.append(
            "layout or device are other ones: dropout's random streams start from the seed"
        )
        return
    private = checkpoint.private(context.rank, context.world_size)
    parts.rng.restore(
        {name.removeprefix(RNG): value for name, value in private.items() if name.startswith(RNG)}
    )


def _layout(context: ParallelContext) -> dict:
    return {
        "tensor": context.tensor.size,
        "pipeline": context.pipeline.size,
        "data": context.data.size,
    }
