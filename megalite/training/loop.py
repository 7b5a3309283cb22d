"""The training loop: steps, and what happens between them."""

import time
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from math import isfinite

import torch

from megalite.checkpoint.background import AsyncSaver
from megalite.checkpoint.fence import Lease
from megalite.config.run import RunConfig
from megalite.models.batch import Microbatch
from megalite.models.cost import flops_per_sequence
from megalite.optim.optimizer import StepResult
from megalite.parallel.activity import Activity, Traffic
from megalite.parallel.context import ParallelContext
from megalite.training.bad_steps import describe_bad_step, stop_at_bad_step
from megalite.training.batches import GlobalBatches
from megalite.training.build import TrainingComponents
from megalite.training.communication import communication_table
from megalite.training.evaluate import evaluate
from megalite.training.metrics import format_losses, training_line, with_total
from megalite.training.output import Log
from megalite.training.profile import Profiler
from megalite.training.replicas import check_replicas
from megalite.training.signals import Stop, StopSignals
from megalite.training.state import Progress, reserve_memory, save_state
from megalite.training.sum_over_ranks import last_stage_values, sum_over_ranks
from megalite.training.trace import Tracer
from megalite.training.writers import Writers

PHASES = ("data", "forward", "backward", "communication", "optimizer")
"""What a step's time is spent on: NAME_seconds in the metrics file, as means over ranks."""
LEASE_CHECK_SECONDS = 10.0
"""Between two checks of who owns --save, a file on a shared disk. Within that time a run that was
replaced ends, and stops adding to the metrics file, which its successor writes as well."""
FAILED_WAIT_SECONDS = 60.0
"""How long a run that has failed waits for the save that is running, at most."""


@dataclass(frozen=True)
class TrainStepResult:
    """What one training step gave: the same on every rank, except `seconds` and `traffic`."""

    iteration: int
    batch_size: int
    """Samples in the global batch."""
    losses: dict[str, float]
    """Mean of each term of the loss over the global batch by name, after their sum under `loss`."""
    update: StepResult
    """Gradient norm and learning rate, whether the update was skipped, and the loss scale."""
    seconds: float
    """Duration of the step on this rank."""
    phase_seconds: dict[str, float]
    """NAME_seconds of each phase, mean over ranks; empty where phases are not timed."""
    traffic: dict[tuple[str, str], Traffic]
    """What this rank communicated by (group, kind), if --log-communication shows it."""
    stop: Stop | None
    """Why the run has to stop after this step."""
    save_ended: bool
    """Whether an asynchronous save has ended on every rank, or failed on one."""


@dataclass
class Trainer:
    """Trains until the configured end; evaluates, reports and saves on the way."""

    config: RunConfig
    context: ParallelContext
    components: TrainingComponents
    progress: Progress
    train_data: GlobalBatches
    validation_data: GlobalBatches | None
    metrics: Writers
    """Of rank 0; empty on the others."""
    signals: StopSignals
    log: Log
    """Prints on rank 0."""
    lease: Lease | None = None
    """Rank 0's right to write to --save."""
    saver: AsyncSaver | None = None
    """Writes checkpoints while training goes on; None without --async-save."""
    started: float = field(default_factory=time.monotonic)
    """When --exit-duration-in-mins began."""
    step_seconds: float | None = None
    """Running mean of the duration of a step, for the time left."""
    lease_checked_at: float = 0.0
    """When rank 0 last checked its lease."""
    replicas_equal_at: int | None = None
    """The iteration after which replicas were last found equal."""
    saved_at: int = 0
    """The iteration of the last checkpoint."""

    def run(self) -> Stop:
        """Train; returns why it stopped. With --save, the last state is saved. Collective."""
        train_iters = self.config.training.train_iters
        profiler = Profiler(self.config.training, self.context)
        tracer = Tracer(self.config.training, self.context, self.progress.iteration + 1)
        self.saved_at = self.progress.iteration  # what was loaded need not be saved again
        stop = None
        if self.saver is not None:
            reserve_memory(self.saver, self.components, self.config.checkpoint)
        try:
            while stop is None and self.progress.iteration < train_iters:
                iteration = self.progress.iteration + 1
                with profiler.iteration(iteration), tracer.iteration(iteration):
                    result = self._step(iteration)
                    self._report(result)
                stop = self._finish_iteration(result)
            # A signal during the evaluation stops a run that has not saved yet.
            if self.config.checkpoint.save and self.saved_at != self.progress.iteration:
                self._save()
            self._finish_save()
            self.components.optimizer.wait_for_parameters()
            tracer.finish()
        except Exception:
            # What is being saved was good. The other ranks wait for this one, not for long.
            hang_timeout = self.config.parallel.hang_timeout
            limit = min(FAILED_WAIT_SECONDS, hang_timeout / 4 or FAILED_WAIT_SECONDS)
            with suppress(Exception):
                self._finish_save(limit)
            raise
        finally:
            # The ranks may take their time for what is left: profiles and metrics to write.
            self.context.activity.set_state("saving")
            profiler.close()
            self.train_data.close()
            if self.saver is not None:
                self.saver.close()
        return stop or Stop(f"all {train_iters} iterations are done")

    def _step(self, iteration: int) -> TrainStepResult:
        """One optimizer step. Collective over all ranks."""
        training = self.config.training
        model = self.components.model
        optimizer = self.components.optimizer
        began = time.perf_counter()
        activity = self._begin_timing(iteration)
        optimizer.zero_gradients()

        # Take this step's microbatches; those of the next one are read while this one computes.
        first = self.progress.consumed_samples
        batch_size = self.train_data.sizes.at(first)
        end = first + batch_size
        with activity.timed("data"):
            then = end if iteration < training.train_iters else None
            microbatches, weights = self.train_data.at(first, then)

        # Accumulate the gradients of all microbatches: the engine runs the pipeline's schedule.
        losses = self.components.engine.train_step(microbatches, weights)

        # Sum the gradients over replicas, clip them, and update the weights.
        with activity.timed("optimizer"):
            update = optimizer.step(optimizer.schedule.position(iteration, end))
        if update.bad:
            self._report_bad_step(iteration, update, microbatches)

        # One small all-reduce: time of each phase, terms of the loss, whether any rank has to stop.
        traffic = activity.take_traffic()
        seconds = activity.take_seconds()
        values = {f"{phase}_seconds": seconds.get(phase, 0.0) for phase in PHASES}
        values |= last_stage_values(model.loss_names, losses, model)
        values |= self.signals.counts()
        values["late"] = float(self._is_late())
        if self.saver is not None:
            values["saves_running"] = float(self.saver.is_running)
            values["saves_failed"] = float(self.saver.has_failed)
        sums = sum_over_ranks(values, self.context)
        phase_seconds = {}
        for phase in PHASES if self.times_phases(iteration) else ():
            name = f"{phase}_seconds"
            phase_seconds[name] = sums[name] / self.context.world_size

        self.progress.iteration = iteration
        self.progress.consumed_samples = end
        losses = with_total({name: sums[name] for name in model.loss_names})
        stop = self._stop_after(iteration, sums)
        seconds = time.perf_counter() - began
        return TrainStepResult(
            iteration,
            batch_size,
            losses,
            update=update,
            seconds=seconds,
            phase_seconds=phase_seconds,
            traffic=traffic,
            stop=stop,
            save_ended=_save_ended(sums),
        )

    def _report_bad_step(
        self, iteration: int, update: StepResult, microbatches: list[Microbatch]
    ) -> None:
        """Log what is known of a bad step. Raises BadStepError after too many in a row."""
        where = describe_bad_step(self.components, microbatches)
        self.log(f"iteration {iteration} | bad step, not applied: {update.bad}; {where}")
        if self.components.optimizer.bad_steps.are_too_many:
            stop_at_bad_step(self.config, iteration, update)

    def _finish_iteration(self, result: TrainStepResult) -> Stop | None:
        """Check replicas, save and evaluate where it is time. Returns why the run has to stop."""
        if result.save_ended:
            self._finish_save()
        training = self.config.training
        iteration = result.iteration
        is_last = iteration == training.train_iters
        if _is_due(training.check_replicas, iteration):
            self._check_replicas()
        if self.config.checkpoint.save:
            interval = self.config.checkpoint.save_interval
            if result.stop or is_last or _is_due(interval, iteration):
                self._save()
        # After the save, since whoever sends a signal may not wait for an evaluation.
        stop = None
        if is_last or _is_due(training.eval_interval, iteration):
            stop = self._evaluate()
        return stop or result.stop

    # When to stop -----------------------------------------------------------------------------

    def _is_late(self) -> bool:
        minutes = self.config.training.exit_duration_in_mins
        return minutes is not None and time.monotonic() - self.started >= 60 * minutes

    def _stop_after(self, iteration: int, sums: dict[str, float]) -> Stop | None:
        """Why all ranks have to stop after this iteration, from the sums over ranks."""
        training = self.config.training
        if stop := self.signals.stop(sums):
            return stop
        if sums["late"]:
            minutes = training.exit_duration_in_mins
            return Stop(f"--exit-duration-in-mins {minutes:g} are over", requeue=True)
        if _is_due(training.exit_interval, iteration):
            return Stop(f"--exit-interval {training.exit_interval}")
        return None

    def _stop_by_signal(self) -> Stop | None:
        """Why all ranks have to stop, if any rank has caught a signal. Collective."""
        return self.signals.stop(sum_over_ranks(self.signals.counts(), self.context))

    # Time and reports -------------------------------------------------------------------------

    def _begin_timing(self, iteration: int) -> Activity:
        """From here on the time of this step's phases is measured."""
        activity = self.context.activity
        activity.set_state("training", iteration)
        activity.synchronize = None
        if self.context.device.type == "cuda" and self.times_phases(iteration):
            activity.synchronize = partial(torch.cuda.synchronize, self.context.device)
        activity.take_seconds()
        if self.config.training.log_communication and self._is_logged(iteration):
            activity.count_traffic()
        return activity

    def times_phases(self, iteration: int) -> bool:
        """Whether this step's phases are timed: on a GPU, the host waits at the end of each."""
        return self.context.device.type != "cuda" or self._is_logged(iteration)

    def _is_logged(self, iteration: int) -> bool:
        """Whether this step has a line on the console."""
        training = self.config.training
        return _is_due(training.log_interval, iteration) or iteration == training.train_iters

    def _report(self, result: TrainStepResult) -> None:
        """Pass a step's numbers to the writers, and print a line at each --log-interval. The losses
        of a bad step may be no numbers in JSON."""
        self._check_lease()
        config = self.config
        batch_size = result.batch_size
        line = {
            "iteration": result.iteration,
            **{name: loss for name, loss in result.losses.items() if isfinite(loss)},
            **self._update_numbers(result.update),
            **result.update.statistics,
            "learning_rate": result.update.learning_rate,
            "consumed_samples": self.progress.consumed_samples,
            "step_seconds": result.seconds,
            **result.phase_seconds,
            "tokens_per_second": batch_size * config.model.seq_length / result.seconds,
        }
        if config.data.rampup_batch_size:
            line["global_batch_size"] = batch_size
        self.metrics.write(**line)
        if self.step_seconds is None:
            self.step_seconds = result.seconds
        else:
            self.step_seconds = 0.9 * self.step_seconds + 0.1 * result.seconds
        if self._is_logged(result.iteration):
            total = config.training.train_iters
            flops = batch_size * flops_per_sequence(config.model, config.head_cost)
            average = self.step_seconds
            self.log(training_line(line, result.losses, total, flops=flops, average=average))
            if config.training.log_communication:
                self.log(communication_table(result.traffic, self.context))

    def _update_numbers(self, update: StepResult) -> dict[str, float]:
        """What there is to report of an optimizer step: a skipped one has no norm, which may be no
        number in JSON."""
        numbers = {} if update.skipped else {"grad_norm": update.gradient_norm}
        config = self.config.optimizer
        if config.chosen_precision == "fp16":
            numbers["loss_scale"] = update.loss_scale
        if config.chosen_precision == "fp16" or config.max_bad_steps:
            optimizer = self.components.optimizer
            numbers["skipped_steps"] = optimizer.loss_scale.overflows + optimizer.bad_steps.total
        return numbers

    def _check_lease(self) -> None:
        """Raise CheckpointError, on rank 0, when another run has taken --save.

        The other ranks learn of it as of any failure.
        """
        now = time.monotonic()
        if self.lease is not None and now - self.lease_checked_at >= LEASE_CHECK_SECONDS:
            self.lease_checked_at = now
            with suppress(OSError, ValueError):  # a disk that does not answer proves nothing
                self.lease.check()

    # Between steps ----------------------------------------------------------------------------

    def _evaluate(self) -> Stop | None:
        """Evaluate and report. Ends early when any rank catches a signal: returns that stop."""
        data = self.validation_data
        if data is None:
            return None
        iteration = self.progress.iteration
        self.context.activity.set_state("evaluating")
        iterations = self.config.training.eval_iters
        losses = evaluate(self.components, data, iterations, interrupted=self._stop_by_signal)
        self.context.activity.set_state("training")
        if isinstance(losses, Stop):
            return losses
        losses = {f"validation_{name}": value for name, value in losses.items()}
        self.metrics.write(iteration=iteration, **losses)
        self.log(f"iteration {iteration} | {format_losses(losses)}")
        return None

    def _check_replicas(self) -> None:
        iteration = self.progress.iteration
        if self.replicas_equal_at != iteration:
            check_replicas(self.components, iteration)
            self.replicas_equal_at = iteration
            self.log(f"iteration {iteration} | replicas are bitwise equal")

    def _save(self) -> None:
        if self.config.training.check_replicas:
            self._check_replicas()  # what the check refuses must not be saved
        self._finish_save()
        began = time.perf_counter()
        self.context.activity.set_state("saving")
        save_state(self.components, self.progress, self.config, self.lease, self.saver)
        self.context.activity.set_state("training")
        self.saved_at = self.progress.iteration
        if self.saver is None:
            seconds = time.perf_counter() - began
            folder = self.config.checkpoint.save
            self.log(f"saved {folder} at iteration {self.saved_at} in {seconds:.1f} s")

    def _finish_save(self, timeout: float | None = None) -> None:
        """Wait for the asynchronous save that is pending, if there is one. Raises what made it
        fail: on every rank, since all ranks call this after the same step."""
        if self.saver is None or not self.saver.is_pending:
            return
        self.context.activity.set_state("saving")
        times = self.saver.finish(timeout)
        self.context.activity.set_state("training")
        where = f"{self.config.checkpoint.save} at iteration {times.iteration}"
        stopped = f"training was stopped for {times.blocked_seconds:.2f} s"
        self.log(f"saved {where} in {times.seconds:.1f} s; {stopped}")


def _save_ended(sums: dict[str, float]) -> bool:
    """Whether an asynchronous save has ended on every rank, or failed on one, from the sums over
    ranks; False without asynchronous saves.

    A failure in `write` is raised on all ranks, and ends all threads. After any other, the ranks
    whose thread still waits for the failed one wait until that rank has ended, as after any error.
    """
    return sums.get("saves_failed", 0) > 0 or sums.get("saves_running", 1) == 0


def _is_due(interval: int | None, iteration: int) -> bool:
    """Whether something that is done every `interval` iterations is done after this one."""
    return bool(interval) and iteration % interval == 0
