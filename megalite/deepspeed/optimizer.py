"""DeepSpeed's engine behind the interface of `optim.optimizer.Optimizer`."""

import io
import logging
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import nullcontext, redirect_stdout
from functools import partial
from typing import Any, NamedTuple

import torch

from megalite.models.stage import Stage
from megalite.nn.parameter import HALF_PRECISIONS
from megalite.optim.bad_steps import BadSteps
from megalite.optim.config import OptimizerConfig
from megalite.optim.loss_scale import LossScale
from megalite.optim.optimizer import Elements, StepResult, groups_by_rule, set_rates
from megalite.optim.schedule import Schedule
from megalite.optim.treatment import treatment_of
from megalite.optim.update_rules import UPDATE_RULES, allocate_moments, set_step_count, torch_adam
from megalite.parallel.collectives import all_reduce
from megalite.parallel.context import ParallelContext

SHARED_MEMORY_OPERATOR = "deepspeed_shm_comm"
VERBOSE = {"log_level", "memory_breakdown", "dump_state", "wall_clock_breakdown"}
"""Settings of a user who wants to read what DeepSpeed logs: otherwise only its warnings."""
REPORTED = ("OVERFLOW! Skipping step", "ZeRO with an untested optimizer")
"""Warnings of DeepSpeed's about what the log of the run has, or what has been tested here."""


class Mpu:
    """The groups of a context under the names by which DeepSpeed asks for them ("model parallel
    unit")."""

    def __init__(self, context: ParallelContext):
        self._data = context.data
        self._tensor = context.tensor
        self._alone = context.alone

    def _handle(self, group) -> Any:
        return group.handle or self._alone

    def get_data_parallel_group(self):
        """The ranks that ZeRO shards over."""
        return self._handle(self._data)

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Their global ranks."""
        return list(self._data.ranks)

    def get_data_parallel_world_size(self) -> int:
        """Number of them."""
        return self._data.size

    def get_data_parallel_rank(self) -> int:
        """This rank's index among them."""
        return self._data.rank

    def get_model_parallel_group(self):
        """The ranks that share the weights of a layer: norms are summed over them."""
        return self._handle(self._tensor)

    def get_model_parallel_world_size(self) -> int:
        """Number of them."""
        return self._tensor.size

    def get_model_parallel_rank(self) -> int:
        """This rank's index among them."""
        return self._tensor.rank

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_rank = get_model_parallel_rank


class _Fragment(NamedTuple):
    """Where this rank's elements of a parameter lie in DeepSpeed's flat fp32 weights."""

    elements: Elements
    """(start, stop) of the flattened parameter."""
    flat: torch.Tensor
    """The tensor that torch's optimizer updates."""
    offset: int
    """Of the first element in `flat`."""

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The elements in a tensor that is laid out like `flat`."""
        start, stop = self.elements
        return tensor.detach()[self.offset : self.offset + stop - start]


class DeepSpeedOptimizer:
    """Sums, clips and applies the gradients of one model by DeepSpeed's engine (ZeRO, Rajbhandari
    et al. 2020). The model has one pipeline stage.

    DeepSpeed divides sums of gradients by the number d of data ranks; `loss_factor` makes up for
    it. Gradients of sequence parallelism, of which each tensor-parallel rank has a part, are summed
    as they are computed. torch's optimizer is ours; DeepSpeed lets it update flat fp32 copies of
    the weights, of which `ranges[name]` is this rank's part of a parameter. At stage 3 the model's
    own weights are divided likewise.

    Args:
        settings: what DeepSpeed is given, `settings.for_engine`.
    """

    keeps_master = True
    """In fp32 too: DeepSpeed updates a copy of the weights."""
    is_sharded = True
    """Data ranks hold different shards of the optimizer's state."""

    def __init__(
        self,
        model: Stage,
        context: ParallelContext,
        config: OptimizerConfig,
        schedule: Schedule,
        settings: dict[str, Any],
    ):
        self.config = config
        self.schedule = schedule
        self.parameters = model.parameters_by_name
        self.loss_scale = LossScale.from_config(config)
        self.bad_steps = BadSteps(config)
        self.steps = 0
        """Updates done, skipped steps not counted."""
        self._backwards_left = 0
        self.shards_weights = settings["zero_optimization"]["stage"] == 3
        self.loss_factor = float(context.data.size)
        dtypes = {parameter.dtype for parameter in self.parameters.values()}
        self.is_half = not dtypes.isdisjoint(HALF_PRECISIONS)
        for parameter in self.parameters.values():
            # By this DeepSpeed knows which norms to sum over the tensor-parallel ranks.
            parameter.model_parallel = "tensor" in parameter.spec.sharded
            if "tensor" in parameter.spec.partial:
                parameter.register_hook(partial(_summed, context))
        self.engine = _engine(model, context, config, settings)
        self.inner: torch.optim.Optimizer = self.engine.basic_optimizer
        self._fragments = dict(self._find_fragments(context.data.rank))
        self.ranges = {name: fragment.elements for name, fragment in self._fragments.items()}

    def _find_fragments(self, data_rank: int) -> Iterator[tuple[str, _Fragment]]:
        zero = self.engine.optimizer
        for name, parameter in self.parameters.items():
            if self.shards_weights:
                group, offset, size = zero.grad_position[zero.get_param_id(parameter)]
                flat = zero.fp32_partitioned_groups_flat[group]
                start = data_rank * size
                stop = min(start + size, parameter.ds_numel)  # the last shard is padded
            elif parameter._hp_mapping is None:
                continue
            else:
                mapping = parameter._hp_mapping
                flat = self.inner.param_groups[mapping.param_group_index]["params"][0]
                offset = mapping.hp_fragment_address.start
                start = mapping.lp_fragment_address.start
                stop = start + mapping.lp_fragment_address.numel
            if start < stop:
                yield name, _Fragment((start, stop), flat, offset)

    # One step ----------------------------------------------------------------------------------

    def zero_gradients(self) -> None:
        """Before a step: DeepSpeed has forgotten the gradients of the last one."""
        self.engine.set_gradient_accumulation_boundary(False)
        if self.config.dtype == "float16":
            # The loss is multiplied by `loss_factor` as well: without it, gradients overflow where
            # ours would.
            scale = self.loss_scale.value / self.loss_factor
            self.engine.optimizer.override_loss_scale(scale)

    def begin_step(self, microbatches: int) -> None:
        """The last of this many backwards completes the gradients."""
        self._backwards_left = microbatches

    def backward(self, loss: torch.Tensor) -> None:
        """The backward of one microbatch: DeepSpeed's hooks collect and sum the gradients."""
        if self._backwards_left == 1:
            self.engine.set_gradient_accumulation_boundary(True)
        self._backwards_left -= 1
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self, position: int) -> StepResult:
        """As `Optimizer.step`. DeepSpeed leaves the weights as they are if the gradient is not
        finite."""
        scale = self.loss_scale.value
        rate = self.schedule.learning_rate(position)
        set_rates([self.inner], self.schedule, position)
        self.engine.step()
        norm = float("nan")
        if self.engine.was_step_applied():
            norm = float(self.engine.get_global_grad_norm())
            self.steps += 1
        elif self.loss_scale.can_fall:
            self.loss_scale.update(overflowed=True)
            return StepResult(norm, learning_rate=rate, skipped=True, loss_scale=scale)
        bad = self.bad_steps.judge(norm)
        if bad:
            self.loss_scale.restart_window()
        else:
            self.loss_scale.update(overflowed=False)
        return StepResult(norm, rate, skipped=bool(bad), bad=bad, loss_scale=scale)

    def bad_gradients(self) -> list[str]:
        """None: DeepSpeed has forgotten the gradients of a step that it skipped."""
        return []

    def wait_for_parameters(self, names: Iterable[str] | None = None) -> None:
        """Nothing to wait for: a step leaves the weights complete."""

    # State -------------------------------------------------------------------------------------

    def weights(self) -> Iterator[tuple[str, torch.Tensor, Elements | None]]:
        """As `Optimizer.weights`: at stage 3 this rank's shard of each."""
        for name, parameter in self.parameters.items():
            if not self.shards_weights:
                yield name, parameter, None
            elif name in self.ranges:
                start, stop = self.ranges[name]
                yield name, parameter.ds_tensor[: stop - start], (start, stop)

    @torch.no_grad()
    def weights_were_set(self) -> None:
        """Gather again what DeepSpeed keeps whole of the small weights at stage 3. Collective."""
        if self.shards_weights:
            kept = self.engine.optimizer.persistent_parameters
            if kept:
                kept[0].partition(kept)
                kept[0].all_gather(kept)

    @property
    def master(self) -> dict[str, torch.Tensor]:
        """This rank's part of each weight in fp32, flat, a view of what is updated."""
        return {name: part.of(part.flat) for name, part in self._fragments.items()}

    def state(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        """As `Optimizer.state`."""
        self.allocate_state()
        for name, part in self._fragments.items():
            if self.is_half:
                yield "master", name, part.of(part.flat)
            for kind in self._moments:
                yield kind, name, part.of(self.inner.state[part.flat][kind])

    @property
    def _moments(self) -> tuple[str, ...]:
        return self.config.moments(self.config.optimizer)

    def _flats(self) -> list[torch.Tensor]:
        """What torch's optimizer updates."""
        return list({id(part.flat): part.flat for part in self._fragments.values()}.values())

    def allocate_state(self) -> None:
        """As `Optimizer.allocate_state`."""
        allocate_moments(self.inner, self._flats(), self._moments)
        # torch makes its state at the first step only if there is none at all.
        self.set_steps(self.steps)

    def set_steps(self, steps: int) -> None:
        """Set the count of updates done, which Adam's bias correction needs."""
        self.steps = steps
        set_step_count(self.inner, self._flats(), steps)


def _summed(context: ParallelContext, gradient: torch.Tensor) -> torch.Tensor:
    """A gradient of which each tensor-parallel rank has a part, summed."""
    gradient = gradient.clone(memory_format=torch.contiguous_format)
    all_reduce(gradient, context.tensor)
    return gradient


def _is_unreported(record: logging.LogRecord) -> bool:
    """Whether a warning of DeepSpeed's says what the run does not report itself."""
    message = record.getMessage()
    return not any(text in message for text in REPORTED)


def _engine(
    model: Stage, context: ParallelContext, config: OptimizerConfig, settings: dict[str, Any]
):
    """DeepSpeed's engine for the model, on the groups of the context. Collective."""
    # DeepSpeed looks for its device in the environment, at its import.
    device = context.device
    os.environ["DS_ACCELERATOR"] = device.type
    os.environ["LOCAL_RANK"] = str(device.index or 0)
    import deepspeed

    # It calls torch's collectives by names that torch 2.13 warns of.
    renamed = r"`torch\.distributed\.\w+` is deprecated"
    warnings.filterwarnings("ignore", renamed, category=FutureWarning)
    is_quiet = not any(settings.get(name) for name in VERBOSE)
    if is_quiet:
        deepspeed.utils.logger.setLevel(logging.WARNING)
        deepspeed.utils.logger.addFilter(_is_unreported)
    # Only inference uses this operator. Building it takes minutes, behind a lock that outlives a
    # build that was killed.
    deepspeed.ops.__compatible_ops__[SHARED_MEMORY_OPERATOR] = False
    parameters = model.parameters_by_name
    treatments = {}
    for name, parameter in parameters.items():
        treatments[name] = treatment_of(name, parameter.spec.weight_decay, config)
    ((rule, groups),) = groups_by_rule(treatments, parameters).items()
    make = {"adam": torch_adam}.get(rule) or partial(UPDATE_RULES[rule], gradients=None)
    quiet = nullcontext()
    if is_quiet:
        # It prints what memory is in use even where nobody asks.
        quiet = redirect_stdout(io.StringIO())
    with quiet:
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=make(groups, config),
            config=settings,
            mpu=Mpu(context),
            dist_init_required=False,
        )
    return engine
