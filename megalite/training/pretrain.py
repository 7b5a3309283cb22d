"""pretrain(): the main job, composed of the library's rooms."""

import re
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from megalite.checkpoint.fence import Lease
from megalite.checkpoint.folder import CheckpointError, latest_iteration
from megalite.config.run import RunConfig, to_yaml
from megalite.data.build import blended, build_sources, data_state
from megalite.data.indexed import DatasetError
from megalite.data.tokenizers import TokenizerError
from megalite.kernels import native
from megalite.nn.attention import Attention
from megalite.optim.optimizer import NonFiniteGradient
from megalite.parallel.collectives import barrier, gather_objects
from megalite.parallel.context import DeviceError, ParallelContext, tell_torchrun
from megalite.parallel.launch import LaunchInfo
from megalite.system.errors import explain_os_error
from megalite.training.batches import GlobalBatches, build_batches
from megalite.training.build import TrainingComponents, build_components, build_context, build_model
from megalite.training.loop import Trainer
from megalite.training.metrics import MetricsFile
from megalite.training.replicas import ReplicasDiffer
from megalite.training.signals import StopSignals
from megalite.training.startup import check_data, take_lease
from megalite.training.state import Progress, load_state, settle_data
from megalite.training.writers import Writers, tracking_writers
from megalite.watch.agreement import RanksDiffer
from megalite.watch.stragglers import check_stragglers
from megalite.watch.watchdog import LostContact, Watchdog

EXPECTED_ERRORS = (
    CheckpointError,
    DatasetError,
    DeviceError,
    LostContact,
    NonFiniteGradient,
    OSError,
    RanksDiffer,
    ReplicasDiffer,
    TokenizerError,
)
"""What the data, the disk or the machine bring about: their messages say what to do, a traceback adds nothing."""


def explain(error: Exception) -> str | None:
    """What to tell the user in place of a traceback; None when the error is unexpected, and the traceback is needed."""
    if isinstance(error, EXPECTED_ERRORS):
        return explain_os_error(error) if isinstance(error, OSError) else str(error)
    if _loses_contact(error):  # within a run, this became LostContact
        return f"could not meet the other ranks: {str(error).splitlines()[0]}"
    return None


def _loses_contact(error: Exception) -> bool:
    """Whether the error says only that another rank is gone. gloo raises plain RuntimeErrors that begin with its source
    file."""
    return type(error).__module__ == "torch.distributed" or "gloo/transport" in str(error)


def _lost_contact(error: Exception, watchdog: Watchdog) -> LostContact:
    """The error of a rank that lost others, with the reason why they are gone."""
    calls = [
        frame.name
        for frame in traceback.extract_tb(error.__traceback__)
        if "/torch/" not in frame.filename
    ]
    reason = re.sub(r"^\[.*?\.cc:\d+\] |\. This is .*", "", str(error).splitlines()[0])
    why = watchdog.why_contact_was_lost()
    return LostContact(why and f"{why}\n  (contact was lost in {' > '.join(calls[-2:])}: {reason})")


def pretrain(config: RunConfig, launch: LaunchInfo, build_model: Callable = build_model) -> None:
    """Run a resolved configuration from start, or from its checkpoint, to the end of the training.

    `build_model(config, context, rng)` makes this rank's stage. Raises before training starts when data, device or
    checkpoint are not what the configuration says. What several ranks fail with alike is raised on the first of them,
    and as a LostContact without words on the others, so that it is said once.
    """
    catching = config.training.exit_signal_handler
    # The warning that time is nearly over comes once. SIGTERM may end a rank that waits in vain to meet the others.
    warning = StopSignals(catching, [signal.SIGUSR1])
    try:
        context, description = build_context(config, launch)
        say = partial(print, file=sys.stderr, flush=True)
        with Watchdog(
            context, config.parallel.hang_timeout, config.checkpoint.save or ".", say
        ) as watchdog:
            signals = StopSignals(catching)
            try:
                _run(config, context, description, build_model, signals)
                _leave_together(context, watchdog)
            except Exception as error:
                if _loses_contact(error):
                    raise _lost_contact(error, watchdog) from None
                message = explain(error)
                text = (
                    "".join(traceback.format_exception_only(error)).strip()
                    if message is None
                    else message
                )
                if watchdog.report_failure(text):
                    raise LostContact from None
                raise
            finally:
                watchdog.stop_reporting()
                context.destroy()
                signals.uninstall()
    finally:
        warning.uninstall()


def pretrain_or_exit(
    config: RunConfig, launch: LaunchInfo, build_model: Callable = build_model
) -> None:
    """pretrain(), as the last act of a program: what `explain` explains ends the process with that, in place of a
    traceback."""
    try:
        pretrain(config, launch, build_model)
    except Exception as error:
        # A launcher sends it when another rank has ended: that must not cut off what this one has to say.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        explanation = explain(error)
        if explanation is None:
            tell_torchrun(error)
            raise
        program = "pretrain_bert.py" if config.is_bert else "pretrain_gpt.py"
        sys.exit((explanation and f"{program}: rank {launch.rank}: {explanation}") or 1)


def _leave_together(context: ParallelContext, watchdog: Watchdog) -> None:
    """Wait for the others at the end, so that one that gets stuck before is a hang."""
    everyone = replace(context.control, untimed=False)
    context.activity.set_state("ending")
    barrier(everyone)
    watchdog.stop_reporting()
    barrier(everyone)  # nobody reports any more when the first leaves, perhaps with the store


def _run(
    config: RunConfig,
    context: ParallelContext,
    description: str,
    build_model: Callable,
    signals: StopSignals,
) -> None:
    def say(text: str) -> None:
        if context.rank == 0:
            print(text, flush=True)

    say(to_yaml(config).rstrip())
    say(description)
    seed = config.training.seed
    wanted = _samples_wanted(config)
    sources = build_sources(config.data, config.model, seed, wanted, config.bert)
    parts = build_components(config, context, build_model)
    say(_model_line(parts, context))
    say(_kernels_line(parts, config))
    lease = None if config.training.dry_run else take_lease(config.checkpoint.save, context)
    progress = _starting_point(config, parts, context)
    now = data_state(config.data, config.model, seed, wanted["train"], config.bert)
    check_data(now.to_json(), context)
    settle_data(progress, now, config.checkpoint.allow_data_change)
    for note in progress.notes:
        say(note)
    datasets = {
        split: blended(its, progress.data if split == "train" else None)
        for split, its in sources.items()
    }
    batches = {
        name: build_batches(config, dataset, parts.model) for name, dataset in datasets.items()
    }
    if config.training.dry_run:
        _dry_run(parts, context, batches["train"], progress.consumed_samples, say)
        return
    if config.parallel.check_stragglers:
        check_stragglers(context, say)
    _train(config, context, parts, progress, batches, lease, signals, say)


def _train(
    config: RunConfig,
    context: ParallelContext,
    parts: TrainingComponents,
    progress: Progress,
    batches: dict,
    lease: Lease | None,
    signals: StopSignals,
    say: Callable[[str], None],
) -> None:
    if progress.iteration >= config.training.train_iters:
        say(
            f"nothing to do: the checkpoint is at iteration {progress.iteration} of {config.training.train_iters}"
        )
        return
    metrics = Writers()
    if context.rank == 0:
        watching = tracking_writers(config, progress.iteration, say)
        metrics = Writers(MetricsFile(config.training.metrics_file), *watching)
    told = gather_objects((signals.received, signals.warned), context.control)
    caught = {received.name: warned for received, warned in told if received}
    try:
        if caught:
            reason, to_be_continued = (
                f"{' and '.join(caught)} before the first step",
                all(caught.values()),
            )
        else:
            trainer = Trainer(
                config,
                context,
                parts,
                progress,
                batches["train"],
                batches.get("valid"),
                metrics,
                lease,
            )
            say(f"training from iteration {progress.iteration} to {config.training.train_iters}")
            reason, to_be_continued = trainer.run(), trainer.to_be_continued
        say(f"stopped at iteration {progress.iteration}: {reason}")
        if (
            lease is not None
            and to_be_continued
            and progress.iteration < config.training.train_iters
        ):
            lease.request_requeue(f"stopped at iteration {progress.iteration}: {reason}")
        if config.checkpoint.save is None:
            say("no checkpoint was written: --save is not set")
    finally:
        metrics.close()


def _samples_wanted(config: RunConfig) -> dict[str, int]:
    """How many samples of each split the run reads; of validation, as many as Megatron-LM would ask for."""
    training, batch = config.training, config.data.global_batch_size
    samples = {"train": training.train_iters * batch}
    if training.eval_interval and training.eval_iters:
        evaluations = training.train_iters // training.eval_interval + 1
        samples["valid"] = evaluations * training.eval_iters * batch
    return samples


def _starting_point(
    config: RunConfig, parts: TrainingComponents, context: ParallelContext
) -> Progress:
    options = config.checkpoint
    if options.load is None:
        return Progress()
    # A job script names the same folder for --save and --load: its first run finds nothing there yet.
    same = options.save is not None and Path(options.load).resolve() == Path(options.save).resolve()
    if same and options.ckpt_step is None and latest_iteration(options.load) is None:
        return Progress(notes=[f"no checkpoint in {options.load} yet: starting from scratch"])
    return load_state(parts, config, context)


def _model_line(parts: TrainingComponents, context: ParallelContext) -> str:
    """Parameters of the whole model and of each stage; collective over the world."""
    position = context.coordinates
    # A stage's own count has its copy of a tied embedding, the total has not: it is primary on the first stage alone.
    in_stage = {axis: index for axis, index in position.items() if axis != "pipeline"}
    specs = [parameter.spec for parameter in parts.model.parameters()]
    counted = sum(spec.box.numel for spec in specs if spec.is_primary(position))
    in_its_stage = sum(spec.box.numel for spec in specs if spec.is_primary(in_stage))
    ranks = gather_objects((position["pipeline"], counted, in_its_stage), context.control)
    total = sum(counted for _, counted, _ in ranks)
    stages = [0] * context.pipeline.size
    for stage, _, held in ranks:
        stages[stage] += held
    by_stage = ", ".join(f"{count:,}" for count in stages)
    return f"{total:,} parameters" + (f"; by stage {by_stage}" if context.pipeline.size > 1 else "")


def _kernels_line(parts: TrainingComponents, config: RunConfig) -> str:
    """How attention is computed and why, and which kernels there are."""
    attention = next(module for module in parts.model.modules() if isinstance(module, Attention))
    backend, why = attention.backend(
        attention.qkv.weight, config.is_bert or config.data.reset_attention_mask
    )
    wide = "; fp64 takes PyTorch's operations" if config.optimizer.precision == "fp64" else ""
    return f"attention: {backend} ({why}); {native.status()}{wide}"


def _dry_run(
    parts: TrainingComponents, context: ParallelContext, batches: GlobalBatches, consumed: int, say
) -> None:
    """One global batch forward and backward; prints loss, time, memory and shapes of every stage. Changes nothing."""
    began = time.perf_counter()
    loss = parts.engine.train_step(*batches.at(consumed)).sum().item()
    for _ in parts.optimizer.state():
        pass  # the first real step would allocate these: they belong to the peak
    seconds = time.perf_counter() - began
    if context.device.type == "cuda":
        peak, kind = torch.cuda.max_memory_allocated(context.device), "GPU memory"
    else:
        peak, kind = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "resident memory"
    layers = list(parts.model.layers)
    mine = {
        "layers": f"{layers[0]}-{layers[-1]}",
        "passes on": list(parts.model.hidden_shape(parts.engine.micro_batch_size)),
        "peak": peak,
        "loss": loss,
        "parameters": {name: list(p.shape) for name, p in parts.model.named_parameters()},
    }
    ranks = gather_objects(mine, context.control)
    say(f"dry run: {batches.microbatches} microbatches in {seconds:.2f} s")
    for rank, told in enumerate(ranks):
        at = context.layout.coordinates(rank)
        say(
            f"rank {rank} (stage {at['pipeline']}, data {at['data']}, tensor {at['tensor']}): layers {told['layers']}, "
            f"peak {kind} {told['peak'] / 2**20:,.0f} MiB"
            + (
                f", sends {told['passes on']} to the next stage"
                if at["pipeline"] < context.pipeline.size - 1
                else ""
            )
        )
    for stage, rank in enumerate(context.layout.group_of(0, "pipeline")):
        say(f"parameters of stage {stage} on rank {rank}:")
        for name, shape in ranks[rank]["parameters"].items():
            say(f"  {name} {shape}")
    last = [
        told["loss"]
        for rank, told in enumerate(ranks)
        if context.layout.coordinates(rank)["tensor"] == 0
    ]
    say(f"loss {sum(last):.4f}; nothing was saved")
