"""pretrain(): a whole training run, from a configuration to its end."""

import signal
import sys
from collections.abc import Callable, Collection
from contextlib import closing
from dataclasses import replace
from functools import partial

from megalite.checkpoint.background import AsyncSaver
from megalite.checkpoint.folder import has_checkpoint
from megalite.config.rules.disk import same_place
from megalite.config.run import RunConfig, with_values
from megalite.config.summary import keep_config, keep_published, summary_lines
from megalite.data.build import blended, build_sources, data_state
from megalite.parallel.collectives import barrier, gather_objects
from megalite.parallel.context import ParallelContext, tell_torchrun
from megalite.parallel.launch import LaunchInfo
from megalite.training.batches import GlobalBatches, build_batches, samples_to_read
from megalite.training.build import TrainingComponents, build_components, build_context, build_model
from megalite.training.failures import as_lost_contact, explain
from megalite.training.loop import Trainer
from megalite.training.metrics import MetricsFile
from megalite.training.output import Log, failsafe_output, rank_0_printer
from megalite.training.resume import resume, start_from_pretrained
from megalite.training.signals import Stop, StopSignals
from megalite.training.startup_checks import check_data, take_lease
from megalite.training.startup_report import dry_run, kernels_line, model_line
from megalite.training.state import Progress, compare_data_with_checkpoint, load_published
from megalite.training.trace import check_trace_folder
from megalite.training.writers import Writers, tracking_writers
from megalite.watch.stragglers import check_stragglers
from megalite.watch.watchdog import Watchdog


def pretrain(
    config: RunConfig,
    launch: LaunchInfo,
    build_model: Callable = build_model,
    given: Collection[str] | None = None,
) -> None:
    """Run a resolved configuration from start, or from its checkpoint, to the end of the training.

    `build_model(config, context, rng)` makes this rank's stage. given: keys of the fields that the
    user named, None: all; --load-fallback does not go back to a checkpoint that differs in others.

    Raises before training starts when data, device or checkpoint are not what the configuration
    says. An error that several ranks have in common is raised on the first of them; the others
    raise a LostContact with an empty message, so that it is reported once.
    """
    with failsafe_output(launch.rank), StopSignals(config.training.exit_signal_handler) as signals:
        # A job script sends its warning once. The other signals still end a rank that waits in
        # vain to meet the others.
        signals.catch(signal.SIGUSR1)
        context, description = build_context(config, launch)
        log = rank_0_printer(context)
        for line in [*summary_lines(config, context.world_size), description]:
            log(line)

        report = partial(print, file=sys.stderr, flush=True)
        folder = config.checkpoint.save or "."
        with Watchdog(context, config.parallel.hang_timeout, folder, report) as watchdog:
            signals.catch(signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
            try:
                _run(config, context, build_model, signals=signals, given=given)
                _leave_together(context, watchdog)
            except Exception as error:
                lost_contact = as_lost_contact(error, watchdog)
                if lost_contact is not None:
                    raise lost_contact from None
                raise
            finally:
                watchdog.stop_reporting()
                context.destroy()


def pretrain_or_exit(
    config: RunConfig,
    launch: LaunchInfo,
    build_model: Callable = build_model,
    given: Collection[str] | None = None,
) -> None:
    """pretrain() as the last act of a program: exits with status 1 and one line, in place of a
    traceback, where that explains the error."""
    try:
        pretrain(config, launch, build_model, given)
    except Exception as error:
        # A launcher sends SIGTERM when another rank has ended: it must not cut off this message.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        explanation = explain(error)
        if explanation is None:
            tell_torchrun(error)
            raise
        if not explanation:
            sys.exit(1)
        sys.exit(f"pretrain_{config.model.architecture}.py: rank {launch.rank}: {explanation}")


def _leave_together(context: ParallelContext, watchdog: Watchdog) -> None:
    """Wait for the other ranks at the end: one that gets stuck before is reported as a hang."""
    everyone = replace(context.control, untimed=False)
    context.activity.set_state("ending")
    barrier(everyone)
    # Nobody reports any more when the first rank leaves, since the store may go with it.
    watchdog.stop_reporting()
    barrier(everyone)


def _run(
    config: RunConfig,
    context: ParallelContext,
    build_model: Callable,
    signals: StopSignals,
    given: Collection[str] | None,
) -> None:
    """Build everything, continue from the checkpoint if there is one, and train. Collective."""
    log = rank_0_printer(context)
    is_dry_run = config.training.dry_run

    # Open the data before the model is built: a wrong path shows at once.
    seed = config.training.seed
    samples = samples_to_read(config)
    sources = build_sources(config.data, config.model, seed, samples, config.bert)

    # Model, engine and optimizer.
    components = build_components(config, context, build_model)
    log(model_line(components))
    log(kernels_line(components, config))

    # Become the owner of --save, then read the checkpoint in --load.
    lease = None
    if not is_dry_run:
        lease = take_lease(config.checkpoint.save, context)
        check_trace_folder(config.training.trace, context)
    if lease is not None and context.rank == 0:
        log(keep_config(config, config.checkpoint.save))
        if config.checkpoint.load_hf is not None and not has_checkpoint(config.checkpoint.save):
            log(keep_published(config))
    progress = _starting_point(config, components, given)

    _log_notes(progress, log)

    # Continue in the data, which must be the checkpoint's and the same on all nodes. After batches
    # of other sizes, the run takes another number of samples in all.
    planned = samples
    samples = samples_to_read(config, since=(progress.iteration, progress.consumed_samples))
    if samples != planned:
        sources = build_sources(config.data, config.model, seed, samples, config.bert)
    data_now = data_state(config.data, config.model, seed, samples["train"], config.bert)
    check_data(data_now.to_json(), context)
    compare_data_with_checkpoint(progress, data_now, config.checkpoint.allow_data_change)
    _log_notes(progress, log)
    batches = _batches_by_split(config, components, sources, progress)

    if is_dry_run:
        dry_run(components, batches["train"], progress.consumed_samples, log)
        return
    if config.parallel.check_stragglers:
        check_stragglers(context, log)
    if progress.iteration >= config.training.train_iters:
        iterations = f"iteration {progress.iteration} of {config.training.train_iters}"
        log(f"nothing to do: the checkpoint is at {iterations}")
        return
    with closing(_open_writers(config, context.rank, progress.iteration, log)) as metrics:
        trainer = Trainer(
            config=config,
            context=context,
            components=components,
            progress=progress,
            train_data=batches["train"],
            validation_data=batches.get("valid"),
            metrics=metrics,
            signals=signals,
            log=log,
            lease=lease,
            saver=AsyncSaver() if config.checkpoint.async_save else None,
        )
        _train(trainer)


def _batches_by_split(
    config: RunConfig, components: TrainingComponents, sources: dict[str, list], progress: Progress
) -> dict[str, GlobalBatches]:
    """The batches of each split; those of the training continue in the data of `progress`."""
    batches = {}
    for split, source in sources.items():
        dataset = blended(source, progress.data if split == "train" else None)
        # Batches of the evaluation have the same size all the time, to be comparable.
        ramp = config.data.rampup_batch_size if split == "train" else None
        config_of_split = with_values(config, {"rampup_batch_size": ramp})
        batches[split] = build_batches(config_of_split, dataset, components.model)
    return batches


def _starting_point(
    config: RunConfig, components: TrainingComponents, given: Collection[str] | None
) -> Progress:
    """The progress of the checkpoint in --load, which is loaded; else the start, maybe from
    pretrained weights."""
    options = config.checkpoint
    if options.load is not None and not _finds_no_checkpoint(config):
        return resume(components, config, given)
    if options.pretrained_checkpoint is not None:
        return start_from_pretrained(components, config)
    if options.load_hf is not None:
        return load_published(components, config)
    notes = []
    if options.load is not None:
        notes = [f"no checkpoint in {options.load} yet: starting from scratch"]
    return Progress(notes=notes)


def _log_notes(progress: Progress, log: Log) -> None:
    """Log the notes that there are, once."""
    for note in progress.notes:
        log(note)
    progress.notes.clear()


def _finds_no_checkpoint(config: RunConfig) -> bool:
    """Whether this is the first run of a job, whose script names one folder for --save and
    --load."""
    options = config.checkpoint
    is_same = same_place(options.load, options.save)
    return is_same and options.ckpt_step is None and not has_checkpoint(options.load)


def _open_writers(config: RunConfig, rank: int, iteration: int, log: Log) -> Writers:
    """Where rank 0 writes its numbers after `iteration`; nowhere on the other ranks."""
    if rank > 0:
        return Writers()
    tracking = tracking_writers(config, iteration, log)
    if config.training.metrics_file:
        return Writers(MetricsFile(config.training.metrics_file, log), *tracking)
    return Writers(*tracking)


def _train(trainer: Trainer) -> None:
    """Train, unless a signal came before the first step; ask for a requeue where time is over."""
    progress = trainer.progress
    train_iters = trainer.config.training.train_iters
    stop = _signalled_before_start(trainer.signals, trainer.context)
    if stop is None:
        trainer.log(f"training from iteration {progress.iteration} to {train_iters}")
        stop = trainer.run()
    outcome = f"stopped at iteration {progress.iteration}: {stop.reason}"
    trainer.log(outcome)
    if trainer.lease is not None and stop.requeue and progress.iteration < train_iters:
        trainer.lease.request_requeue(outcome)


def _signalled_before_start(signals: StopSignals, context: ParallelContext) -> Stop | None:
    """Why the run stops before its first step, if any rank has caught a signal. Collective."""
    warnings = {}
    ranks = gather_objects((signals.received, signals.is_time_warning), context.control)
    for received, is_time_warning in ranks:
        if received is not None:
            warnings[received.name] = is_time_warning
    if not warnings:
        return None
    return Stop(f"{' and '.join(warnings)} before the first step", requeue=all(warnings.values()))
