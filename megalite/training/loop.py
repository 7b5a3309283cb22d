"""The training loop."""

import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import torch

from megalite.checkpoint.fence import Lease
from megalite.config.run import RunConfig
from megalite.data.indexed import DatasetError
from megalite.models.cost import flops_per_sequence
from megalite.parallel.activity import Activity
from megalite.parallel.collectives import all_reduce
from megalite.parallel.context import ParallelContext
from megalite.training.batches import GlobalBatches
from megalite.training.build import TrainingComponents
from megalite.training.metrics import by_name, in_words, training_line
from megalite.training.profile import Profiler
from megalite.training.replicas import check_replicas
from megalite.training.signals import StopSignals
from megalite.training.state import Progress, save_state
from megalite.training.writers import Writers

PHASES = ("data", "forward", "backward", "communication", "optimizer")
"""What a step's time goes to; NAME_seconds in the metrics file, as means over ranks."""
LOOK_SECONDS = 10.0
"""Between two looks at who owns --save, a file on a shared disk. Within that time a run that was replaced ends, and no
longer adds to the metrics file, which its successor writes as well."""


@dataclass
class Trainer:
    """Trains until the configured end, evaluating, reporting and saving on the way."""

    config: RunConfig
    context: ParallelContext
    parts: TrainingComponents
    progress: Progress
    train_data: GlobalBatches
    validation_data: GlobalBatches | None
    metrics: Writers
    """Of rank 0; the others have none."""
    lease: Lease | None = None
    """Rank 0's right to write to --save."""
    to_be_continued: bool = False
    """Whether it stopped because its time is over, not because someone wants it to end."""
    step_seconds: float | None = None
    """Running mean of the time of a step, for the time left."""
    looked_at: float = 0.0
    """When rank 0 last looked whether the lease still stands."""
    replicas_equal_at: int | None = None
    """The iteration after which replicas were last found equal."""

    def run(self) -> str:
        """Train; returns why it stopped. The state is saved at the end when --save is given. Collective."""
        training, options = self.config.training, self.config.checkpoint
        signals, start, reason = StopSignals(training.exit_signal_handler), time.monotonic(), ""
        saved = self.progress.iteration  # what was loaded need not be saved again
        profiler = Profiler(training, self.context)
        try:
            while self.progress.iteration < training.train_iters and not reason:
                iteration = self.progress.iteration + 1
                with profiler.iteration(iteration):
                    reason = self._step(iteration, signals, start)
                if self._divides(training.check_replicas, iteration):
                    self._check_replicas()
                done = bool(reason) or iteration == training.train_iters
                if options.save and (done or self._divides(options.save_interval, iteration)):
                    self._save()
                    saved = iteration
                # Saved before it is evaluated, and an evaluation is given up at a signal: who sends one may not wait.
                if (
                    self._divides(training.eval_interval, iteration)
                    or iteration == training.train_iters
                ):
                    reason = self._evaluate(iteration, signals) or reason
            if options.save and saved != self.progress.iteration:
                self._save()
        finally:
            signals.uninstall()
            self.context.activity.set_state(
                "saving"
            )  # profiles and metrics, which may take their time
            profiler.close()
            self.train_data.close()
        return reason or f"all {training.train_iters} iterations are done"

    @staticmethod
    def _divides(interval: int | None, iteration: int) -> bool:
        return bool(interval) and iteration % interval == 0

    def _step(self, iteration: int, signals: StopSignals, start: float) -> str:
        """One optimizer step and its report. Returns the reason to stop after it, or an empty string."""
        self.context.activity.set_state("training", iteration)
        began = time.perf_counter()
        optimizer, batch_size = self.parts.optimizer, self.config.data.global_batch_size
        activity = self._begin_timing(iteration)
        optimizer.gradients.zero()
        consumed = self.progress.consumed_samples
        then = consumed + batch_size if iteration < self.config.training.train_iters else None
        with activity.timed("data"):
            batches = self.train_data.at(consumed, then)
        losses = self.parts.engine.train_step(*batches)
        with activity.timed("optimizer"):
            step = optimizer.step(iteration)
        phases = activity.take_seconds()
        minutes = self.config.training.exit_duration_in_mins
        late = minutes is not None and time.monotonic() - start >= 60 * minutes
        # One small all-reduce: where the time went, the terms of the loss, and whether any rank wants to stop.
        told = (phases.get(phase, 0.0) for phase in PHASES)
        *sums, signalled, warned, late = self._sum_over_ranks(
            *told, *self._counted_once(losses), signals.received is not None, signals.warned, late
        )
        means = {
            f"{phase}_seconds": total / self.context.world_size
            for phase, total in zip(PHASES, sums)
        }
        phases = means if self.knows_phases(iteration) else {}
        losses = by_name(self.parts.model.loss_names, sums[len(PHASES) :])
        self.progress.iteration = iteration
        self.progress.consumed_samples += batch_size
        self._report(
            iteration,
            losses,
            step.gradient_norm,
            step.learning_rate,
            time.perf_counter() - began,
            phases,
        )
        self.to_be_continued = bool(late or warned) and not signalled > warned
        if signalled:
            return self._signal_name(signals)
        if late:
            return f"--exit-duration-in-mins {minutes:g} are over"
        if self._divides(self.config.training.exit_interval, iteration):
            return f"--exit-interval {self.config.training.exit_interval}"
        return ""

    @staticmethod
    def _signal_name(signals: StopSignals) -> str:
        return signals.received.name if signals.received else "a signal to another rank"

    def _counted_once(self, values: torch.Tensor) -> list[float]:
        """Quantities of the last stage, so that their sum over all ranks counts each data replica once: its tensor
        ranks all hold the same."""
        return (
            values.tolist()
            if self.parts.model.is_last and self.context.tensor.rank == 0
            else [0.0] * len(values)
        )

    def _sum_over_ranks(self, *values: float) -> list[float]:
        """The sums over all ranks. Collective over the world."""
        total = torch.tensor(values, dtype=torch.float64, device=self.context.device)
        all_reduce(total, self.context.world)
        return total.tolist()

    def _begin_timing(self, iteration: int) -> Activity:
        """Where this step's time goes is noted from here on."""
        activity, device = self.context.activity, self.context.device
        wait = device.type == "cuda" and self.knows_phases(iteration)
        activity.synchronize = partial(torch.cuda.synchronize, device) if wait else None
        activity.take_seconds()
        return activity

    def knows_phases(self, iteration: int) -> bool:
        """Whether this step's phases are timed: on a GPU the host has to wait at the end of each for that."""
        return self.context.device.type != "cuda" or self._is_reported(iteration)

    def _is_reported(self, iteration: int) -> bool:
        """Whether this step has a line on the console."""
        return (
            self._divides(self.config.training.log_interval, iteration)
            or iteration == self.config.training.train_iters
        )

    def _look_at_claim(self) -> None:
        """Raises CheckpointError, on rank 0, when this run was replaced. The other ranks learn it as of any failure."""
        if self.lease is not None and time.monotonic() - self.looked_at >= LOOK_SECONDS:
            self.looked_at = time.monotonic()
            with suppress(OSError, ValueError):  # a disk that does not answer says nothing
                self.lease.check()

    def _report(
        self,
        iteration: int,
        losses: dict[str, float],
        norm: float,
        rate: float,
        seconds: float,
        phases: dict,
    ) -> None:
        self._look_at_claim()
        tokens = self.config.data.global_batch_size * self.config.model.seq_length
        line = {
            "iteration": iteration,
            **losses,
            "grad_norm": norm,
            "learning_rate": rate,
            "consumed_samples": self.progress.consumed_samples,
            "step_seconds": seconds,
            **phases,
            "tokens_per_second": tokens / seconds,
        }
        self.metrics.write(**line)
        training = self.config.training
        self.step_seconds = (
            seconds if self.step_seconds is None else 0.9 * self.step_seconds + 0.1 * seconds
        )
        if self.context.rank == 0 and self._is_reported(iteration):
            flops = flops_per_sequence(self.config.model, self.config.head_cost)
            flops *= self.config.data.global_batch_size
            print(
                training_line(line, losses, training.train_iters, flops, self.step_seconds),
                flush=True,
            )

    def _evaluate(self, iteration: int, signals: StopSignals) -> str:
        """Mean loss and scores over the items of --eval-iters batches: always the same, so that they can be compared.

        Given up when any rank has caught a signal; returns that reason to stop, or an empty string.
        """
        if self.validation_data is None:
            return ""
        model = self.parts.model
        terms, device = len(model.loss_names), self.context.device
        totals = torch.zeros(terms + len(model.score_names), dtype=torch.float64, device=device)
        counts = torch.zeros(terms, dtype=torch.float64, device=device)
        model.eval()
        self.context.activity.set_state("evaluating")
        reason = ""
        for i in range(self.config.training.eval_iters):
            signalled, warned = self._sum_over_ranks(signals.received is not None, signals.warned)
            if signalled:
                self.to_be_continued = not signalled > warned
                reason = self._signal_name(signals)
                break
            batches = self.validation_data.read(i * self.config.data.global_batch_size)
            totals += self.parts.engine.evaluate(batches, torch.ones_like(totals))
            counts += self.validation_data.counts(batches)
        model.train()
        self.context.activity.set_state("training")
        if reason:
            return reason
        sums = self._sum_over_ranks(*self._counted_once(totals), *self._counted_once(counts))
        totals, counts = sums[: len(totals)], sums[len(totals) :]
        if not any(counts):
            raise DatasetError(
                f"the loss counts no token of {self.config.training.eval_iters} validation batches"
            )
        # A score's items are those of its term.
        means = [total / count if count else 0.0 for total, count in zip(totals, counts * 2)]
        named = by_name(model.loss_names, means[:terms]) | dict(
            zip(model.score_names, means[terms:])
        )
        losses = {f"validation_{name}": value for name, value in named.items()}
        self.metrics.write(iteration=iteration, **losses)
        if self.context.rank == 0:
            print(f"iteration {iteration} | {in_words(losses)}", flush=True)
        return ""

    def _check_replicas(self) -> None:
        if self.replicas_equal_at != self.progress.iteration:
            check_replicas(self.parts, self.context, self.progress.iteration)
            self.replicas_equal_at = self.progress.iteration
            if self.context.rank == 0:
                print(
                    f"iteration {self.progress.iteration} | replicas are equal to the bit",
                    flush=True,
                )

    def _save(self) -> None:
        if self.config.training.check_replicas:
            self._check_replicas()  # what is saved must not be what the check would have refused
        began = time.perf_counter()
        self.context.activity.set_state("saving")
        save_state(self.parts, self.progress, self.config, self.context, self.lease)
        self.context.activity.set_state("training")
        if self.context.rank == 0:
            where = f"{self.config.checkpoint.save} at iteration {self.progress.iteration}"
            print(f"saved {where} in {time.perf_counter() - began:.1f} s", flush=True)
