"""The engine: runs one stage's program of forwards, backwards and messages."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from megalite.models.batch import Microbatch
from megalite.models.stage import Stage
from megalite.parallel.collectives import Transfer, exchange
from megalite.parallel.context import ParallelContext
from megalite.pipeline.schedules import FORWARD, Action, Step, forward_only, program, schedule_named

LossWeights = Tensor | Sequence[float]
"""What each of the k terms of the loss is multiplied by, [k]."""

Start = Tensor | GradientEdge | None
"""Where a backward starts."""


@dataclass
class _Run:
    """The state of one pass over the microbatches."""

    microbatches: list[Microbatch]
    loss_weights: Tensor
    """[k], of the terms of the loss."""
    losses: Tensor
    """[k], weighted, of the microbatches so far; zeros before the last stage."""
    losses_of: dict[int, Tensor] = field(default_factory=dict)
    """[k], weighted, by microbatch; on the last stage."""
    in_flight: dict[int, tuple[Tensor | None, Start]] = field(default_factory=dict)
    """What is kept of a microbatch between its forward and its backward: the input from the
    previous stage, whose gradient goes back there; and where the backward starts, the loss or the
    gradient edge of hidden states that are no longer held, None where they need no gradient."""
    outgoing: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    """Computed, not yet posted, by (kind, microbatch): the Action that computed it."""
    incoming: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    """Arrived, not yet used, by (kind, microbatch): the Action that needs it."""
    sending: list = field(default_factory=list)
    """(handles, tensors) of messages on their way; the tensors must live until the handles are
    done."""


class PipelineEngine:
    """Runs a schedule on this rank's stage. With one stage it is plain gradient accumulation.

    A stage is a module, called as `stage(x, batch)` with hidden states (None on the first stage)
    and a Microbatch. It gives hidden states of shape `stage.hidden_shape(b)` and dtype
    `stage.dtype`; the last stage gives the sums of the k terms of the loss over this microbatch,
    [k].
    """

    def __init__(
        self, stage: Stage, context: ParallelContext, micro_batch_size: int, schedule: str = "1f1b"
    ):
        self.stage = stage
        self.context = context
        self.micro_batch_size = micro_batch_size
        self.schedule: Callable = schedule_named(schedule)
        self.run_stage: Callable[[Tensor | None, Microbatch], Tensor] = stage
        """Called for a forward: the stage, or what wraps it."""
        self.backward_of_loss: Callable[[Tensor], None] = torch.autograd.backward
        """Called for the backward of a microbatch on the last stage."""
        self.loss_scale: Callable[[], float] = lambda: 1.0
        """What the loss is multiplied by before its backward: gradients come out that many times as
        large, the returned losses do not."""
        self.before_last_backward: Callable[[], None] = lambda: None
        """Called before the last backward of a step: it completes the gradients."""
        self.losses_of: dict[int, Tensor] = {}
        """The k weighted terms of the loss of each microbatch in the last pass, [k], by its number;
        empty on all but the last stage."""

    def train_step(self, microbatches: list[Microbatch], loss_weights: LossWeights) -> Tensor:
        """Forward and backward of all microbatches; gradients of `(sums * loss_weights).sum()` are
        accumulated.

        Returns the k weighted terms of the loss, [k], which are zeros on all but the last stage. A
        term's weight is 1 / number of items (for a GPT, unmasked tokens) in the global batch, which
        makes it a global mean.
        """
        return self._run(self.schedule, microbatches, loss_weights)

    @torch.no_grad()
    def evaluate(self, microbatches: list[Microbatch], loss_weights: LossWeights) -> Tensor:
        """Forward of all microbatches, without gradients.

        Returns what the last stage computes, summed over microbatches and weighted: the k terms of
        the loss, [k], or from a stage in evaluation mode the k terms and then its scores,
        [k + scores]. `loss_weights` has that length. Zeros on all but the last stage.
        """
        return self._run(forward_only, microbatches, loss_weights)

    def _run(self, schedule: Callable, microbatches: list[Microbatch], loss_weights) -> Tensor:
        pipeline = self.context.pipeline
        device = self.context.device
        activity = self.context.activity
        weights = torch.as_tensor(loss_weights, dtype=torch.float64, device=device)
        run = _Run(microbatches, weights, torch.zeros(len(weights), device=device))
        actions = schedule(pipeline.size, pipeline.rank, len(microbatches))
        backwards_left = sum(action.kind != FORWARD for action in actions)
        for step in program(actions, pipeline.rank, pipeline.size):
            self._post(run, step)
            if step.action is None:
                continue
            if step.action.kind == FORWARD:
                with activity.timed("forward"):
                    self._forward(run, step.action)
            else:
                if backwards_left == 1:
                    self.before_last_backward()
                backwards_left -= 1
                with activity.timed("backward"):
                    self._backward(run, step.action)
        self._finish_sending(run)
        self.losses_of = run.losses_of
        return run.losses

    def _post(self, run: _Run, step: Step) -> None:
        """Post a step's messages together and wait for those that arrive here.

        Sends go on during the computation that follows: they are waited for before the next post.
        """
        # Collect the tensors: what was computed here leaves, and what comes gets memory.
        own_rank = self.context.pipeline.rank
        transfers = []
        arriving = {}
        for message in step.messages:
            key = (message.kind, message.microbatch)
            if message.source == own_rank:
                transfers.append(Transfer(run.outgoing.pop(key), message.target, send=True))
            else:
                # Gradients have the shape of the hidden states that they belong to.
                shape = self.stage.hidden_shape(self.micro_batch_size)
                tensor = torch.empty(shape, dtype=self.stage.dtype, device=self.context.device)
                arriving[key] = tensor
                transfers.append(Transfer(tensor, message.source, send=False))

        # Earlier sends must be done before new ones are posted.
        self._finish_sending(run)
        handles = exchange(transfers, self.context.pipeline)

        # Wait for what arrives; keep the handles of what leaves.
        if len(handles) == len(transfers):
            for handle, transfer in zip(handles, transfers):
                if transfer.send:
                    run.sending.append((handle, transfer.tensor))
                else:
                    handle.wait()
        else:  # `exchange` returned one handle for all transfers, since the backend merged them
            for handle in handles:
                handle.wait()
        run.incoming.update(arriving)

    def _finish_sending(self, run: _Run) -> None:
        for handle, _ in run.sending:
            handle.wait()
        run.sending = []

    def _forward(self, run: _Run, action: Action) -> None:
        trains = torch.is_grad_enabled()
        received = None
        if not self.stage.is_first:
            received = run.incoming.pop(action).requires_grad_(trains)  # [s, b, h] or [s/t, b, h]
        output = self.run_stage(received, run.microbatches[action.microbatch])
        if self.stage.is_last:
            if output.shape != run.loss_weights.shape:
                shapes = f"{tuple(output.shape)}, the weights {tuple(run.loss_weights.shape)}"
                raise ValueError(
                    f"the last stage's sums of loss terms have shape {shapes}: one weight for "
                    "each term"
                )
            # Weighted before the backward: gradients of microbatches add up to a global mean.
            losses = output * run.loss_weights.to(output.dtype)
            run.losses = run.losses + losses.detach()
            run.losses_of[action.microbatch] = losses.detach()
            # A loss that is not finite makes every gradient NaN, so that all ranks see it in the
            # gradient norm: on its own, a loss of inf may have finite gradients.
            loss = losses.sum()
            output = loss * (self.loss_scale() + 0 * loss.detach())
        else:
            # The next stage receives into a tensor of this shape; gloo accepts a smaller message
            # without an error.
            expected = self.stage.hidden_shape(self.micro_batch_size)
            shape = tuple(output.shape)
            if shape != expected:
                raise ValueError(
                    f"a stage made hidden states {shape}, the next expects {expected}: "
                    f"every microbatch needs {self.micro_batch_size} rows of --seq-length tokens"
                )
            run.outgoing[action] = output.detach()
            # The edge is enough for the backward: the hidden states are freed once they are sent.
            # A first stage whose parameters are all frozen has none.
            output = get_gradient_edge(output) if output.requires_grad else None
        if trains:
            run.in_flight[action.microbatch] = (received, output)

    def _backward(self, run: _Run, action: Action) -> None:
        received, output = run.in_flight.pop(action.microbatch)
        if self.stage.is_last:
            self.backward_of_loss(output)
        else:
            # The gradient of the hidden states has come from the next stage.
            gradient = run.incoming.pop(action)
            if output is not None:
                torch.autograd.backward((output,), (gradient,))
        if received is not None:
            run.outgoing[action] = received.grad.contiguous()
