"""The optimizer step: update rules on fp32 (fp64) weights, with master copies where the model is in
half precision."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch.nn import Parameter

from megalite.nn.parameter import HALF_PRECISIONS
from megalite.optim.bad_steps import BadSteps
from megalite.optim.config import OptimizerConfig
from megalite.optim.gradients import GradientBuffer
from megalite.optim.loss_scale import LossScale
from megalite.optim.parameters import ParameterBuffer
from megalite.optim.schedule import Schedule
from megalite.optim.statistics import Statistics
from megalite.optim.treatment import Treatment, treatment_of
from megalite.optim.update_rules import UPDATE_RULES, allocate_moments, set_step_count, weights_of
from megalite.parallel.config import ParallelConfig
from megalite.parallel.context import ParallelContext

Elements = tuple[int, int]
"""(start, stop) of a flattened parameter's elements."""


@dataclass(frozen=True)
class StepResult:
    """What an optimizer step did, the same on every rank."""

    gradient_norm: float
    """Global norm, before clipping."""
    learning_rate: float
    skipped: bool = False
    """Whether the weights were left as they are, because the scaled gradients overflowed (fp16) or
    the step is bad."""
    bad: str = ""
    """Why the step is bad; "" if it is not."""
    loss_scale: float = 1.0
    """What the loss was multiplied by before the backward; 1 unless the precision is fp16."""
    statistics: dict[str, float] = field(default_factory=dict)
    """What --log-params-norm and the like ask for, by the names of the metrics file."""


class Optimizer:
    """Sums, clips and applies the gradients of one model, and keeps its learning rate.

    `master[name]` is the tensor that is updated: the parameter itself, or in half precision an fp32
    copy that the parameter is rounded from after each step. With `use_distributed_optimizer` (ZeRO
    stage 1, Rajbhandari et al. 2020) it is the flat range `ranges[name]` of the parameter, and
    parameters of which this rank updates nothing have no entry.

    Frozen parameters (`parameter_groups`) get `requires_grad` False, and the optimizer has nothing
    of them.
    """

    def __init__(
        self,
        parameters: dict[str, Parameter],
        context: ParallelContext,
        config: OptimizerConfig,
        schedule: Schedule,
        parallel: ParallelConfig,
    ):
        self.config = config
        self.schedule = schedule
        self._of_model = parameters
        self.treatments: dict[str, Treatment] = {}
        self.parameters: dict[str, Parameter] = {}
        """Those that are trained, by name."""
        for name, parameter in parameters.items():
            treatment = treatment_of(name, parameter.spec.weight_decay, config)
            parameter.requires_grad_(not treatment.frozen)
            if not treatment.frozen:
                self.parameters[name] = parameter
                self.treatments[name] = treatment
        self.loss_scale = LossScale.from_config(config)
        self.bad_steps = BadSteps(config)
        self.gradients = GradientBuffer(self.parameters, context, parallel)
        self.statistics = Statistics(self.gradients, config)
        self.ranges = self.gradients.ranges
        self.overlaps_gather = parallel.overlap_param_gather
        self.parameter_buffer = None
        if self.gradients.sharded and self.parameters:
            self.parameter_buffer = ParameterBuffer(self.gradients)
        self.keeps_master = any(p.dtype in HALF_PRECISIONS for p in self.parameters.values())
        self.master = {}
        for name in self.ranges:
            weight = self._updated_weight(name)
            self.master[name] = weight.float() if self.keeps_master else weight
        self.inner: dict[str, torch.optim.Optimizer] = {}
        """torch's optimizers by update rule."""
        for rule, groups in groups_by_rule(self.treatments, self.master).items():
            self.inner[rule] = UPDATE_RULES[rule](groups, config, self.gradients)
        self.steps = 0
        """Updates done, skipped steps not counted."""

    @property
    def loss_factor(self) -> float:
        """What the loss is to be multiplied by before its backward."""
        return self.loss_scale.value

    def zero_gradients(self) -> None:
        """Forget all gradients, before the first backward of a step."""
        self.gradients.zero()

    def begin_step(self, microbatches: int) -> None:
        """The backwards of this many microbatches complete the gradients of the coming step."""
        self.gradients.begin_step(microbatches)

    @torch.no_grad()
    def step(self, position: int) -> StepResult:
        """Reduce and clip the gradients of the step that ends at a position of the schedule, and
        update the weights.

        Collective over all ranks. The weights stay as they are, on every rank alike, if the
        gradient overflowed and the loss scale can fall, or if the step is bad.
        """
        # Sum the gradients over ranks, and look at them before anything changes.
        scale = self.loss_scale.value
        self.gradients.reduce()
        norm = self.gradients.norm() / scale
        rate = self.schedule.learning_rate(position)
        overflowed = not norm < float("inf")  # NaN compares as False
        if overflowed and self.loss_scale.can_fall:
            self.loss_scale.update(overflowed=True)
            return StepResult(norm, learning_rate=rate, skipped=True, loss_scale=scale)
        bad = self.bad_steps.judge(norm)
        if bad:
            self.loss_scale.restart_window()
            return StepResult(norm, learning_rate=rate, skipped=True, bad=bad, loss_scale=scale)
        self.loss_scale.update(overflowed=False)
        statistics = self.statistics.of_gradients(scale)
        self.gradients.clip(norm, self.config.clip_grad, scale)
        set_rates(self.inner.values(), self.schedule, position)
        # Update the master weights with the gradients where they lie, then round the working
        # weights from them.
        self.wait_for_parameters()
        for name, master in self.master.items():
            master.grad = self.gradients.updated_gradient(name)
        for inner in self.inner.values():
            inner.step()
        self.steps += 1
        for name, master in self.master.items():
            master.grad = None
            if self.keeps_master:
                self._updated_weight(name).copy_(master)
        # Gather what the other data ranks have updated, now or while the next forward runs.
        if self.parameter_buffer:
            self.parameter_buffer.start_gathering()
            if not self.overlaps_gather:
                self.parameter_buffer.wait()
        statistics |= self.statistics.of_parameters()
        return StepResult(norm, learning_rate=rate, loss_scale=scale, statistics=statistics)

    shards_weights = False
    """Whether data ranks hold different shards of the model's weights."""

    @property
    def is_sharded(self) -> bool:
        """Whether data ranks hold different shards of the optimizer's state."""
        return self.gradients.sharded

    def _updated_weight(self, name: str) -> torch.Tensor:
        """What this rank updates of a parameter, as a view of it."""
        return self.gradients.updated_part(name, self.parameters[name].detach())

    def wait_for_parameters(self, names: Iterable[str] | None = None) -> None:
        """Block until these parameters hold what the last step made of them; None: all.

        Needed before they are read, where `overlap_param_gather` leaves them on their way.
        """
        if self.parameter_buffer:
            self.parameter_buffer.wait(names)

    def bad_gradients(self) -> list[str]:
        """Parameters of whose summed gradient this rank holds an element that is not finite."""
        names = []
        for name in self.ranges:
            if not torch.isfinite(self.gradients.updated_gradient(name)).all():
                names.append(name)
        return names

    def weights(self) -> Iterator[tuple[str, torch.Tensor, Elements | None]]:
        """(name, tensor, elements) of what this rank holds of the model's weights: each whole
        parameter, as None says, or a flat range of its elements."""
        for name, parameter in self._of_model.items():
            yield name, parameter, None

    def weights_were_set(self) -> None:
        """Called when what `weights` gives has been overwritten, as from a checkpoint."""

    def state(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        """(kind, parameter name, tensor like `master[name]`) of all that a bit-exact resume needs:
        "master" weights where they differ from the parameters, and the moments, allocated if
        absent."""
        self.allocate_state()
        if self.keeps_master:
            for name, master in self.master.items():
                yield "master", name, master
        for rule, inner in self.inner.items():
            for group in inner.param_groups:
                for name, weight in zip(group["names"], group["params"]):
                    for kind in self.config.moments(rule):
                        yield kind, name, inner.state[weight][kind]

    def allocate_state(self) -> None:
        """Allocate the moments of what this rank updates, zero, as the first step would."""
        for rule, inner in self.inner.items():
            allocate_moments(inner, weights_of(inner), self.config.moments(rule))
        # torch makes its state at the first step only if there is none at all.
        self.set_steps(self.steps)

    def set_steps(self, steps: int) -> None:
        """Set the count of updates done, which Adam's bias correction needs."""
        self.steps = steps
        for inner in self.inner.values():
            set_step_count(inner, weights_of(inner), steps)


def groups_by_rule(
    treatments: dict[str, Treatment], weights: dict[str, torch.Tensor]
) -> dict[str, list[dict]]:
    """torch's parameter groups by update rule. Every rank of a stage has the same ones.

    treatments: of the trained parameters. weights: what this rank updates of some of them.
    """
    names: dict[Treatment, list[str]] = {}
    for name, treatment in treatments.items():
        names.setdefault(treatment, []).append(name)
    groups: dict[str, list[dict]] = {}
    for treatment, alike in names.items():
        here = [name for name in alike if name in weights]
        group = {"params": [weights[name] for name in here], "names": here, "all_names": alike}
        group["treatment"] = treatment
        groups.setdefault(treatment.rule, []).append(group)
    return groups


def set_rates(
    optimizers: Iterable[torch.optim.Optimizer], schedule: Schedule, position: int
) -> None:
    """Give every parameter group its learning rate and weight decay at a position."""
    config = schedule.config
    decay = schedule.weight_decay(position)
    rates = {False: schedule.learning_rate(position)}
    if config.decoupled_lr is not None:
        decoupled = replace(schedule, config=config.decoupled)
        rates[True] = decoupled.learning_rate(position)
    for inner in optimizers:
        for group in inner.param_groups:
            treatment = group["treatment"]
            group["lr"] = rates[treatment.is_decoupled] * treatment.lr_factor
            group["weight_decay"] = treatment.weight_decay
            if treatment.weight_decay is None:
                group["weight_decay"] = decay if treatment.decays else 0.0
