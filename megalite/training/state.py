"""The state of a training run for a bit-exact resume, as shards of a checkpoint."""

from collections.abc import Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from megalite import __version__
from megalite.checkpoint.background import AsyncSaver
from megalite.checkpoint.config import CheckpointConfig
from megalite.checkpoint.fence import Lease
from megalite.checkpoint.folder import (
    CheckpointError,
    DamagedCheckpointError,
    history_before,
    save_folder,
)
from megalite.checkpoint.format import MASTER, OPTIMIZER, Shard
from megalite.checkpoint.load import Checkpoint
from megalite.checkpoint.save import write
from megalite.checkpoint.source import TensorSource
from megalite.config.rules.disk import same_place
from megalite.config.run import RunConfig, keys_where, to_flat
from megalite.config.summary import given
from megalite.config.yaml_file import config_of_checkpoint, to_yaml
from megalite.convert.huggingface import HuggingFaceWeights
from megalite.convert.pieces import model_shapes
from megalite.data.sources import DataState
from megalite.nn.parameter import HALF_PRECISIONS, held_boxes
from megalite.optim.optimizer import Optimizer
from megalite.training.build import TrainingComponents

RNG = "rng."


@dataclass
class Progress:
    """How far a run has come. Global counters only: no layout, no rank."""

    iteration: int = 0
    """Optimizer steps done."""
    consumed_samples: int = 0
    """Training sequences used, which is also the position in the data."""
    data: DataState | None = None
    """The training data, and how many samples of each source are used. None: not known yet."""
    notes: list[str] = field(default_factory=list)
    """Lines for the log about how this state was restored."""
    history: list[int] = field(default_factory=list)
    """Iterations of the checkpoints in --save that this run has passed through: those before the
    one it resumed from there, that one, and each that it saved. Others are of another branch."""


def _shards(
    parameter: torch.nn.Parameter,
    stored_name: str,
    tensor: torch.Tensor,
    elements: tuple[int, int] | None = None,
) -> list[Shard]:
    """The shards of this name that `tensor` holds, as `held_boxes` has it."""
    shape = parameter.spec.global_shape
    held = held_boxes(parameter, tensor.detach(), elements)
    return [Shard(stored_name, values, shape, box) for box, values in held]


def _written_shards(parts: TrainingComponents, with_optimizer: bool) -> Iterator[Shard]:
    """The shards of model and optimizer that this rank writes: each is written once, by its primary
    owner."""
    parameters = parts.model.parameters_by_name
    context = parts.model.context
    position = context.coordinates
    of_shards = context.shard_coordinates
    of_weights = of_shards if parts.optimizer.shards_weights else position
    for name, tensor, elements in parts.optimizer.weights():
        if parameters[name].spec.is_primary(of_weights):
            yield from _shards(parameters[name], name, tensor, elements)
    if not with_optimizer:
        return
    of_state = of_shards if parts.optimizer.is_sharded else position
    for kind, name, tensor in parts.optimizer.state():
        if parameters[name].spec.is_primary(of_state):
            stored_name = f"{OPTIMIZER}{kind}.{name}"
            yield from _optimizer_shards(parts.optimizer, stored_name, name, tensor)


def _optimizer_shards(
    optimizer: Optimizer, stored_name: str, name: str, tensor: torch.Tensor
) -> list[Shard]:
    """The shards of a tensor that the optimizer keeps for the parameter `name`."""
    return _shards(optimizer.parameters[name], stored_name, tensor, optimizer.ranges[name])


def save_state(
    parts: TrainingComponents,
    progress: Progress,
    config: RunConfig,
    lease: Lease | None = None,
    saver: AsyncSaver | None = None,
) -> None:
    """Write a checkpoint of the run to --save. Collective.

    With a `saver`, this only starts the save: the checkpoint is that of now, and `saver.finish`
    raises what is raised here otherwise. Raises CheckpointError on every rank when any rank fails;
    the previous checkpoint stays.
    """
    context = parts.model.context
    options = config.checkpoint
    parts.optimizer.wait_for_parameters()
    history = [step for step in progress.history if step < progress.iteration]
    progress.history = [*history, progress.iteration]
    state = {
        "iteration": progress.iteration,
        "history": history,
        "consumed_samples": progress.consumed_samples,
        "optimizer": None if options.no_save_optim else config.optimizer.optimizer,
        "optimizer_steps": parts.optimizer.steps,
        "loss_scale": parts.optimizer.loss_scale.state(),
        "bad_steps": parts.optimizer.bad_steps.state(),
        "data": progress.data.to_json() if progress.data else None,
        "seed": config.training.seed,
        "rng_scheme": config.training.rng_scheme,
        "layout": context.layout.sizes,
        "device": context.device.type,
        "megalite": __version__,
        "torch": torch.__version__,
    }
    shards, streams = _to_save(parts, options)
    write_here = partial(
        write,
        options.save,
        progress.iteration,
        state=deepcopy(state),  # of which training may change parts
        config_yaml=to_yaml(given(config)),
        world=context.saving if saver else context.control,
        keep_last=options.keep_last,
        keep_every=options.keep_every,
        lease=lease,
        history=history,
    )
    if saver is None:
        write_here(shards, streams)
    else:
        saver.start(progress.iteration, shards, streams, write_here)


def reserve_memory(saver: AsyncSaver, parts: TrainingComponents, options: CheckpointConfig) -> None:
    """Allocate the host memory that `save_state` copies to, as much as this rank's file has. Raises
    RuntimeError when there is not as much."""
    saver.reserve(*_to_save(parts, options))


def _to_save(
    parts: TrainingComponents, options: CheckpointConfig
) -> tuple[Iterator[Shard], dict[str, torch.Tensor]]:
    """The shards that this rank saves, and its private tensors: the states of its random
    streams."""
    shards = _written_shards(parts, with_optimizer=not options.no_save_optim)
    if options.no_save_rng:
        return shards, {}
    return shards, {RNG + name: value for name, value in parts.rng.states().items()}


def load_weights(checkpoint: TensorSource, parameters: dict[str, torch.nn.Parameter]) -> None:
    """Read a model's parameters, or some of them, by name into this rank's boxes. Any layout may
    have written them.

    A model in another precision takes the fp32 master weights where they are stored. Raises
    CheckpointError that lists every parameter that does not fit.
    """
    shards = []
    for name, parameter in parameters.items():
        shards += _shards(parameter, _source(checkpoint, name, parameter), parameter)
    _read(checkpoint, shards)


def _load_model(
    checkpoint: TensorSource, parts: TrainingComponents, absent: tuple[str, ...] = ()
) -> None:
    """`load_weights` of what this rank holds of the model in training.

    absent: beginnings of the names that keep their initial weights.
    """
    shards = []
    for name, tensor, elements in parts.optimizer.weights():
        if name.startswith(absent):
            continue
        parameter = parts.model.parameters_by_name[name]
        shards += _shards(parameter, _source(checkpoint, name, parameter), tensor, elements)
    _read(checkpoint, shards)


def _source(checkpoint: TensorSource, name: str, parameter: torch.nn.Parameter) -> str:
    """The stored tensor that a parameter is read from: what it was, where it is stored in its own
    half precision, else the master weights, which are rounded once."""
    is_half = parameter.dtype in HALF_PRECISIONS
    if is_half and name in checkpoint.names and checkpoint.dtype(name) == parameter.dtype:
        return name
    return _best_source(checkpoint, name)


def _best_source(checkpoint: TensorSource, name: str) -> str:
    master = MASTER + name
    return master if master in checkpoint.names else name


def _load_optimizer(checkpoint: Checkpoint, parts: TrainingComponents, config: RunConfig) -> None:
    stored = checkpoint.state["optimizer"]
    converted = checkpoint.state.get("converted_from")
    if stored is None and converted:
        raise CheckpointError(
            f"{checkpoint.folder} holds weights alone (converted from {converted}): use "
            "--finetune, or --pretrained-checkpoint in place of --load"
        )
    if stored is None:
        raise CheckpointError(
            f"{checkpoint.folder} was saved with --no-save-optim: only --no-load-optim, which "
            "starts the optimizer from scratch, resumes from it"
        )
    if stored != config.optimizer.optimizer:
        raise CheckpointError(
            f"{checkpoint.folder} holds the state of --optimizer {stored}, this run uses "
            f"{config.optimizer.optimizer}; use --optimizer {stored}, or --no-load-optim to start "
            "the optimizer from scratch"
        )
    shards = []
    for kind, name, tensor in parts.optimizer.state():
        if kind != "master":
            stored_name = f"{OPTIMIZER}{kind}.{name}"
            shards += _optimizer_shards(parts.optimizer, stored_name, name, tensor)
    try:
        _read(checkpoint, shards)
    except DamagedCheckpointError:
        raise
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}\nThe run that wrote it may have kept no such state, as for frozen parameters "
            "or with --sgd-momentum 0; --no-load-optim starts the optimizer from scratch"
        ) from None
    parts.optimizer.set_steps(checkpoint.state["optimizer_steps"])
    # Older checkpoints have none.
    parts.optimizer.loss_scale.restore(checkpoint.state.get("loss_scale", {}))
    parts.optimizer.bad_steps.restore(checkpoint.state.get("bad_steps", {}))


def _load_master(
    checkpoint: TensorSource, parts: TrainingComponents, absent: tuple[str, ...] = ()
) -> None:
    """Fill the master weights of a half-precision model from the stored ones, else the weights."""
    optimizer = parts.optimizer
    shards = []
    for name, master in optimizer.master.items() if optimizer.keeps_master else ():
        if name.startswith(absent):
            continue
        source = _best_source(checkpoint, name)
        shards += _optimizer_shards(optimizer, source, name, master)
    _read(checkpoint, shards)


def _read(checkpoint: TensorSource, shards: list[Shard]) -> None:
    checkpoint.check(shards)
    for shard in shards:
        checkpoint.read_into(shard)


def read_state(parts: TrainingComponents, config: RunConfig, step: int | None) -> Progress:
    """Read iteration `step` (None: the latest) of --load: weights, optimizer, random streams and
    data position, as the flags say. Nothing communicates; once all ranks have read theirs,
    `parts.optimizer.weights_were_set` must be called.

    Any layout reads any layout's checkpoint. The streams of --rng-scheme megatron belong to ranks,
    so in another layout they start from the seed; a note says so. Raises CheckpointError when
    something that the flags ask for is not stored, DamagedCheckpointError when it is damaged.
    """
    options = config.checkpoint
    verify = options.verify_checkpoint == "on"
    with Checkpoint.open(options.load, step, verify) as checkpoint:
        if options.finetune:
            return _weights_alone(checkpoint, parts, config, "--finetune")
        _load_model(checkpoint, parts)
        _load_master(checkpoint, parts)
        if not options.no_load_optim:
            _load_optimizer(checkpoint, parts, config)
        state = checkpoint.state
        progress = Progress(state["iteration"], state["consumed_samples"])
        if state.get("data"):  # older checkpoints do not have it
            progress.data = DataState.from_json(state["data"])
        progress.notes.append(f"resumed from {checkpoint.folder} at iteration {progress.iteration}")
        progress.history = _history(checkpoint, config)
        streams = _restore_rng(checkpoint, parts, config)
        # All has been read: what follows changes the run for good.
        _continue_batches(checkpoint, progress, parts, config)
        keys = keys_where(lambda field: field.changes_numbers)
        progress.notes += _changes(checkpoint, config, keys)
        progress.notes += streams
    return progress


def _history(checkpoint: Checkpoint, config: RunConfig) -> list[int]:
    """The history of a run that resumes from this checkpoint; [] when it saves elsewhere."""
    options = config.checkpoint
    root = save_folder(options.load)
    if not same_place(str(root), options.save):
        return []
    iteration = checkpoint.iteration
    return [*history_before(checkpoint.state, root, iteration), iteration]


def load_published(parts: TrainingComponents, config: RunConfig) -> Progress:
    """Start from the weights of --load-hf: each rank reads its boxes. All else starts from scratch,
    heads that the published model does not have too."""
    folder = config.checkpoint.load_hf
    with HuggingFaceWeights.open(folder) as source:
        published = source.published
        _load_model(source, parts, published.absent)
        _load_master(source, parts, published.absent)
        parts.optimizer.weights_were_set()
        notes = [f"weights of the {published.class_name} in {folder}; all else starts from scratch"]
        names = model_shapes(config.model, config.head_cost)
        heads = []
        for beginning in published.absent:
            if any(name.startswith(beginning) for name in names):
                heads.append(f"{beginning}*")
        if heads:
            missing = f"a {published.class_name} has no {' '.join(heads)}"
            notes.append(f"{missing}: these start from the seed")
        return Progress(notes=notes + published.notes)


def load_pretrained(parts: TrainingComponents, config: RunConfig, step: int) -> Progress:
    """Read the weights of iteration `step` in --pretrained-checkpoint, of any layout. Nothing
    communicates, as in `read_state`.

    Raises CheckpointError when they are not those of this model, DamagedCheckpointError when they
    are damaged.
    """
    options = config.checkpoint
    verify = options.verify_checkpoint == "on"
    with Checkpoint.open(options.pretrained_checkpoint, step, verify) as checkpoint:
        return _weights_alone(checkpoint, parts, config, "--pretrained-checkpoint")


def _weights_alone(
    checkpoint: Checkpoint, parts: TrainingComponents, config: RunConfig, flag: str
) -> Progress:
    """The start of a run that takes nothing but weights, as the flag says."""
    _load_model(checkpoint, parts)
    _load_master(checkpoint, parts)
    notes = [f"weights from {checkpoint.folder}; all else starts from scratch ({flag})"]
    keys = keys_where(lambda field: field.keeps_shapes)
    return Progress(notes=notes + _changes(checkpoint, config, keys))


def _continue_batches(
    checkpoint: Checkpoint, progress: Progress, parts: TrainingComponents, config: RunConfig
) -> None:
    """Continue after batches that had other sizes than this run would have used.

    Schedules that count samples then end elsewhere. Raises CheckpointError when --train-samples or
    --train-tokens are not the iterations that were computed from them.
    """
    done = (progress.iteration, progress.consumed_samples)
    sizes = config.batch_sizes
    if progress.consumed_samples == sizes.consumed_after(progress.iteration):
        return
    iterations = config.iterations_of_samples(sizes, since=done)
    if iterations is not None:
        training = config.training
        given = f"--train-samples {training.train_samples}"
        if training.train_samples is None:
            given = f"--train-tokens {training.train_tokens}"
        raise CheckpointError(
            f"{checkpoint.folder} has used {progress.consumed_samples} samples in "
            f"{progress.iteration} iterations, not in the global batches of this run, so {given} "
            "are not the iterations that were computed from them: use --train-iters "
            f"{max(iterations, progress.iteration)} in its place"
        )
    parts.optimizer.schedule = config.schedule(since=done)
    if config.optimizer.counts_samples:
        progress.notes.append(
            "the sizes of batches have changed: the training and its schedules end at sample "
            f"{parts.optimizer.schedule.length}"
        )


def compare_data_with_checkpoint(progress: Progress, now: DataState, allow_change: bool) -> None:
    """Compare the data `now` with the checkpoint's, and continue in it from the position there.

    Changes `progress`: sets its `data`, with a change recorded in it, and adds to its `notes`.
    Raises CheckpointError when the data is not the checkpoint's and `allow_change` is False.
    """
    if progress.data is None:
        if progress.consumed_samples:
            unknown = "the checkpoint does not say which data it was made with: it is not compared"
            progress.notes.append(unknown)
        progress.data = replace(now, start=0)
        return
    differences = progress.data.differences(now)
    if not differences:
        progress.data = progress.data.with_prefixes_of(now)
    elif allow_change:
        progress.data = progress.data.followed_by(now, progress.consumed_samples)
        sources = progress.data.sources
        used = ", ".join(f"{source.prefix} from sample {source.consumed}" for source in sources)
        changes = "; ".join(differences)
        progress.notes.append(f"the training data changes here: {changes}; now {used}")
    else:
        raise CheckpointError(
            f"the training data is not what the checkpoint was made with: {'; '.join(differences)}"
            "; --allow-data-change goes on with the data of this run"
        )


def _changes(checkpoint: Checkpoint, config: RunConfig, keys: Iterable[str]) -> list[str]:
    """A note for what, of these fields, the checkpoint was made with and this run is not, since the
    numbers will go on differently."""
    before = to_flat(config_of_checkpoint(checkpoint.config_yaml))
    now = to_flat(given(config))
    changed = []
    for key in keys:
        if before[key] != now[key]:
            changed.append(f"{key} {before[key]} -> {now[key]}")
    return [f"changed since the checkpoint was made: {', '.join(changed)}"] if changed else []


def _restore_rng(checkpoint: Checkpoint, parts: TrainingComponents, config: RunConfig) -> list[str]:
    """Restore the random streams, if both runs have streams and have the same layout and device.
    Returns notes about what is not restored."""
    scheme = config.training.rng_scheme
    context = parts.model.context
    state = checkpoint.state
    stored = state.get("rng_scheme", "megatron")  # the only one of older checkpoints
    if stored != scheme:
        return [
            f"the checkpoint was made with --rng-scheme {stored}, this run has {scheme}: from here "
            "on, dropout drops other elements than the run that made it would have dropped"
        ]
    if scheme == "global" or config.checkpoint.no_load_rng:
        return []
    if state["layout"] != context.layout.sizes or state["device"] != context.device.type:
        change = "the layout or the device has changed"
        return [f"{change}: dropout's random streams start from the seed"]
    streams = {}
    for name, value in checkpoint.private(context.rank, context.world_size).items():
        if name.startswith(RNG):
            streams[name.removeprefix(RNG)] = value
    if not streams:
        raise CheckpointError(
            f"{checkpoint.folder} holds no random state, as with --no-save-rng: --no-load-rng "
            "starts dropout's streams from the seed"
        )
    parts.rng.restore(streams)
    return []
