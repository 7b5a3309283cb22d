"""A tiny GPT and its data on one rank, for tests of single parts."""

from dataclasses import dataclass

import torch

from megalite.config.run import RunConfig
from megalite.data.build import blended, build_sources
from megalite.parallel.collectives import Group
from megalite.parallel.context import ParallelContext
from megalite.parallel.launch import LaunchInfo
from megalite.parallel.layout import ParallelLayout
from megalite.training.batches import GlobalBatches, build_batches
from megalite.training.build import TrainingComponents, build_components, build_context
from tests.layouts import Layout, configuration

ONE_PROCESS = LaunchInfo(
    rank=0, world_size=1, local_rank=0, local_world_size=1, init_method="", source="tests"
)
SINGLE = Layout("single")
STEPS = 1000
"""More than any test takes."""


@dataclass
class Tiny:
    """A rank's parts and data."""

    config: RunConfig
    context: ParallelContext
    parts: TrainingComponents
    data: GlobalBatches

    def gradient(self, consumed: int = 0) -> torch.Tensor:
        """Forward and backward of the global batch at this sample; the loss. The gradients are in `main_grad`."""
        self.parts.optimizer.gradients.zero()
        return self.parts.engine.train_step(*self.data.at(consumed))

    def train(self, iteration: int) -> tuple[float, float]:
        """One whole step: (gradient norm, learning rate)."""
        batch_size = self.config.data.global_batch_size
        self.gradient((iteration - 1) * batch_size)
        return self.parts.optimizer.step(iteration)


def build(layout: Layout = SINGLE, launch: LaunchInfo = ONE_PROCESS, **flags) -> Tiny:
    """The model of `layout` on this rank, in fp64 without dropout unless flags say otherwise. Token 0 ends documents,
    where that matters."""
    config = configuration(layout, **flags)
    context, _ = build_context(config, launch)
    dataset = blended(
        build_sources(config.data, config.model, 5, {"train": STEPS}, config.bert)["train"]
    )
    parts = build_components(config, context)
    return Tiny(config, context, parts, build_batches(config, dataset, parts.model, eod=0))


def context_of(layout: ParallelLayout, rank: int = 0) -> ParallelContext:
    """The context that a rank would have, without the other ranks: good for building, not for communication."""
    place = layout.coordinates(rank)
    groups = {
        axis: Group(tuple(range(size)), getattr(place, axis)) for axis, size in vars(layout).items()
    }
    world = Group(tuple(range(layout.world_size)), rank)
    return ParallelContext(
        layout, place, torch.device("cpu"), world, control=world, embedding=None, **groups
    )
