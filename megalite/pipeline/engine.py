"""The engine: runs one rank's program of computations and messages."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from megalite.models.batch import Microbatch
from megalite.models.stage import Stage
from megalite.models.stages import Stages
from megalite.nn.weight_gradient import WeightGradients
from megalite.parallel.collectives import receive, send
from megalite.parallel.config import ParallelConfig
from megalite.parallel.context import ParallelContext
from megalite.pipeline.messages import Message, Step, is_sent, made, needed, program
from megalite.pipeline.schedules import (
    BACKWARD,
    FORWARD,
    INPUT,
    WEIGHT,
    Action,
    Orders,
    describe,
    forward_only,
    pipeline_of,
    training_orders,
)
from megalite.pipeline.simulate import simulate

LossWeights = Tensor | Sequence[float]
"""What each of the k terms of the loss is multiplied by, [k]."""

Start = Tensor | GradientEdge | None
"""Where a backward starts."""

PHASES = {FORWARD: "forward", BACKWARD: "backward", INPUT: "backward", WEIGHT: "backward"}


def _run_stage(stage: Stage, x: Tensor | None, batch: Microbatch) -> Tensor:
    return stage(x, batch)


class _InFlight(NamedTuple):
    """What is kept of a microbatch on a stage between its forward and its backward."""

    received: Tensor | None
    """The input from the previous stage, whose gradient goes back there."""
    start: Start
    """Where the backward starts: the loss, or the gradient edge of hidden states that are no longer
    held; None where they need no gradient."""


@dataclass
class _Run:
    """The state of one pass over the microbatches."""

    microbatches: list[Microbatch]
    loss_weights: Tensor
    """[k], of the terms of the loss."""
    losses: Tensor
    """[k], weighted, of the microbatches so far; zeros on ranks without the last stage."""
    losses_of: dict[int, Tensor] = field(default_factory=dict)
    """[k], weighted, by microbatch."""
    in_flight: dict[tuple[int, int], _InFlight] = field(default_factory=dict)
    """By microbatch and stage."""
    deferred: dict[tuple[int, int], tuple] = field(default_factory=dict)
    """(products, received, gradient) of a backward whose weight gradients are still to be computed,
    by microbatch and stage."""
    arriving: dict[Message, tuple] = field(default_factory=dict)
    """(handle, tensor) of receives that are posted, and of what passes between two stages of this
    rank, whose handle is None."""
    sending: dict[int, tuple] = field(default_factory=dict)
    """(handle, tensor) of what is on its way to each rank: the tensor must live until the handle is
    done."""


class PipelineEngine:
    """Runs a schedule on this rank's stages. With one stage it is plain gradient accumulation.

    A stage is called as `stage(x, batch)` with hidden states (None on the first stage) and a
    Microbatch. It gives hidden states of shape `stage.hidden_shape(b)` and dtype `stage.dtype`; the
    last stage of the model gives the sums of the k terms of the loss over this microbatch, [k].

    Args:
        model: this rank's stages.
        context: this rank's groups.
        micro_batch_size: sequences of a microbatch, b.
        config: the schedule, with the number of ranks of the context's pipeline.
    """

    def __init__(
        self, model: Stages, context: ParallelContext, micro_batch_size: int, config: ParallelConfig
    ):
        self.stages = model.by_number
        self.context = context
        self.micro_batch_size = micro_batch_size
        self.config = config
        self.pipeline = pipeline_of(config)
        context.activity.name_of = partial(describe, pipeline=self.pipeline)
        self.hidden_shape = model.hidden_shape(micro_batch_size)
        """Of what passes between stages; gradients have the shape of their hidden states."""
        self.dtype = model.dtype
        self.run_stage: Callable[[Stage, Tensor | None, Microbatch], Tensor] = _run_stage
        """Called for a forward."""
        self.backward_of_loss: Callable[[Tensor], None] = torch.autograd.backward
        """Called for the backward of a microbatch on the last stage."""
        self.weight_gradients = WeightGradients()
        """Collects the gradients of the stages' parameters."""
        self.loss_scale: Callable[[], float] = lambda: 1.0
        """What the loss is multiplied by before its backward: gradients come out that many times as
        large, the returned losses do not."""
        self.before_step: Callable[[int], None] = lambda microbatches: None
        """Called before the forwards and backwards of this many microbatches."""
        self.losses_of: dict[int, Tensor] = {}
        """The k weighted terms of the loss of each microbatch in the last pass, [k], by its number;
        empty on ranks without the last stage."""
        self._programs: dict[tuple[bool, int], list[Step]] = {}
        self._free: list[Tensor] = []
        """Buffers for what is received."""

    def train_step(self, microbatches: list[Microbatch], loss_weights: LossWeights) -> Tensor:
        """Forward and backward of all microbatches; gradients of `(sums * loss_weights).sum()` are
        accumulated.

        Returns the k weighted terms of the loss, [k], which are zeros on ranks without the last
        stage. A term's weight is 1 / number of items (for a GPT, unmasked tokens) in the global
        batch, which makes it a global mean.
        """
        self.before_step(len(microbatches))
        return self._run(True, microbatches, loss_weights)

    @torch.no_grad()
    def evaluate(self, microbatches: list[Microbatch], loss_weights: LossWeights) -> Tensor:
        """Forward of all microbatches, without gradients.

        Returns what the last stage computes, summed over microbatches and weighted: the k terms of
        the loss, [k], or from a stage in evaluation mode the k terms and then its scores,
        [k + scores]. `loss_weights` has that length. Zeros on ranks without the last stage.
        """
        return self._run(False, microbatches, loss_weights)

    def _program(self, trains: bool, microbatches: int) -> list[Step]:
        """This rank's program for a number of microbatches, which a run changes seldom."""
        if (trains, microbatches) not in self._programs:
            if trains:
                orders: Orders = training_orders(self.config, microbatches)
            else:
                orders = forward_only(self.pipeline, microbatches)
            timeline = simulate(orders, self.pipeline)
            steps = program(timeline, self.pipeline, self.context.pipeline.rank)
            self._programs[trains, microbatches] = steps
        return self._programs[trains, microbatches]

    def _run(self, trains: bool, microbatches: list[Microbatch], loss_weights) -> Tensor:
        device = self.context.device
        weights = torch.as_tensor(loss_weights, dtype=torch.float64, device=device)
        run = _Run(microbatches, weights, torch.zeros(len(weights), device=device))
        activity = self.context.activity
        for step in self._program(trains, len(microbatches)):
            activity.action = step.action
            for message in step.receives:
                self._receive(run, message)
            arrived = self._take(run, needed(step.action, self.pipeline))
            with activity.timed(PHASES[step.action.kind]):
                output = self._compute(run, step.action, arrived)
            self._give(run, made(step.action, self.pipeline), output)
        activity.action = None
        for handle, _ in run.sending.values():
            handle.wait()
        self.losses_of = run.losses_of
        return run.losses

    # Messages ----------------------------------------------------------------------------------

    def _receive(self, run: _Run, message: Message) -> None:
        """Post a receive."""
        if self._free:
            tensor = self._free.pop()
        else:
            tensor = torch.empty(self.hidden_shape, dtype=self.dtype, device=self.context.device)
        source = self.pipeline.rank_of(message.source)
        run.arriving[message] = (receive(tensor, source, self.context.pipeline), tensor)

    def _take(self, run: _Run, message: Message | None) -> Tensor | None:
        """What an action needs from another stage, once it has arrived."""
        if message is None:
            return None
        handle, tensor = run.arriving.pop(message)
        if handle is not None:
            handle.wait()
        return tensor

    def _give(self, run: _Run, message: Message | None, tensor: Tensor | None) -> None:
        """Send what an action has made, or keep it for another stage of this rank."""
        if not is_sent(message, self.pipeline):
            if message is not None:
                run.arriving[message] = (None, tensor)
            return
        # One message to a rank at a time: more would stay in memory where a rank lags behind.
        target = self.pipeline.rank_of(message.target)
        if target in run.sending:
            run.sending[target][0].wait()
        run.sending[target] = (send(tensor, target, self.context.pipeline), tensor)

    # Computations ------------------------------------------------------------------------------

    def _compute(self, run: _Run, action: Action, arrived: Tensor | None) -> Tensor | None:
        """Run an action; returns what it makes for another stage."""
        if action.kind == FORWARD:
            return self._forward(run, action, arrived)
        if action.kind == WEIGHT:
            return self._deferred_weight_gradients(run, action)
        return self._backward(run, action, arrived)

    def _forward(self, run: _Run, action: Action, received: Tensor | None) -> Tensor | None:
        trains = torch.is_grad_enabled()
        stage = self.stages[action.stage]
        if received is not None:
            received.requires_grad_(trains)  # [s, b, h] or [s/t, b, h]
        output = self.run_stage(stage, received, run.microbatches[action.microbatch])
        outgoing = None
        if stage.is_last:
            output = self._add_loss(run, action.microbatch, output)
        else:
            # The next stage receives into a tensor of this shape; gloo accepts a smaller message
            # without an error.
            shape = tuple(output.shape)
            if shape != self.hidden_shape:
                raise ValueError(
                    f"a stage made hidden states {shape}, the next expects {self.hidden_shape}: "
                    f"every microbatch needs {self.micro_batch_size} rows of --seq-length tokens"
                )
            outgoing = output.detach()
            # The edge is enough for the backward: the hidden states are freed once they are sent.
            # A first stage whose parameters are all frozen has none.
            output = get_gradient_edge(output) if output.requires_grad else None
        if trains:
            run.in_flight[action[1:]] = _InFlight(received, output)
        else:
            self._reuse(action, received, None)
        return outgoing

    def _add_loss(self, run: _Run, microbatch: int, sums: Tensor) -> Tensor:
        """Add a microbatch's weighted sums of the k terms to the losses; returns the scalar that
        its backward starts from."""
        if sums.shape != run.loss_weights.shape:
            shapes = f"{tuple(sums.shape)}, the weights {tuple(run.loss_weights.shape)}"
            raise ValueError(
                f"the last stage's sums of loss terms have shape {shapes}: one weight for each term"
            )
        # Weighted before the backward: gradients of microbatches add up to a global mean.
        losses = sums * run.loss_weights.to(sums.dtype)
        run.losses = run.losses + losses.detach()
        run.losses_of[microbatch] = losses.detach()
        # A loss that is not finite makes every gradient NaN, so that all ranks see it in the
        # gradient norm: on its own, a loss of inf may have finite gradients.
        loss = losses.sum()
        return loss * (self.loss_scale() + 0 * loss.detach())

    def _backward(self, run: _Run, action: Action, gradient: Tensor | None) -> Tensor | None:
        """The whole backward, or its INPUT part; returns the gradient of the stage's input."""
        received, start = run.in_flight.pop(action[1:])
        if action.kind == INPUT:
            with self.weight_gradients.deferring() as products:
                self._backward_from(start, gradient)
            # Products read tensors of the backward, maybe the two that were received.
            run.deferred[action[1:]] = (products, received, gradient)
        else:
            self._backward_from(start, gradient)
            self._reuse(action, received, gradient)
        return None if received is None else received.grad.contiguous()

    def _backward_from(self, start: Start, gradient: Tensor | None) -> None:
        """Run a backward. gradient: of the hidden states; None on the last stage, whose backward
        starts from its loss."""
        if gradient is None:
            self.backward_of_loss(start)
        elif start is not None:
            torch.autograd.backward((start,), (gradient,))

    def _deferred_weight_gradients(self, run: _Run, action: Action) -> None:
        products, received, gradient = run.deferred.pop(action[1:])
        self.weight_gradients.run_deferred(products)
        self._reuse(action, received, gradient)

    def _reuse(self, action: Action, received: Tensor | None, gradient: Tensor | None) -> None:
        """Keep the buffers of what a stage has received from other ranks for what comes next."""
        stage = action.stage
        own_rank = self.pipeline.rank_of(stage)
        for tensor, source in ((received, stage - 1), (gradient, stage + 1)):
            if tensor is not None and self.pipeline.rank_of(source) != own_rank:
                self._free.append(tensor.detach())
