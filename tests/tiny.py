"""A tiny GPT and its data on one rank, for tests of single modules."""

from dataclasses import dataclass

import torch

from megalite.config.run import RunConfig
from megalite.data.build import blended, build_sources
from megalite.nn.config import ModelConfig
from megalite.nn.settings import LayerSettings
from megalite.optim.optimizer import StepResult
from megalite.parallel.collectives import Group
from megalite.parallel.context import ParallelContext
from megalite.parallel.launch import LaunchInfo
from megalite.parallel.layout import ParallelLayout
from megalite.parallel.rng import CounterBasedRng
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
    """What a rank trains with: model, engine and optimizer, and the data."""

    config: RunConfig
    context: ParallelContext
    components: TrainingComponents
    data: GlobalBatches

    def gradient(self, consumed: int = 0) -> torch.Tensor:
        """Forward and backward of the global batch at this sample; the loss. The gradients are in
        `main_grad`."""
        self.components.optimizer.zero_gradients()
        return self.components.engine.train_step(*self.data.at(consumed))

    def train(self, iteration: int) -> StepResult:
        """One whole step."""
        batch_size = self.config.data.global_batch_size
        self.gradient((iteration - 1) * batch_size)
        return self.components.optimizer.step(iteration)


def build(layout: Layout = SINGLE, launch: LaunchInfo = ONE_PROCESS, **flags) -> Tiny:
    """The model of `layout` on this rank, in fp64 without dropout unless flags say otherwise. Token
    0 ends documents, where that matters."""
    config = configuration(layout, **flags)
    context, _ = build_context(config, launch)
    dataset = blended(
        build_sources(config.data, config.model, 5, {"train": STEPS}, config.bert)["train"]
    )
    components = build_components(config, context)
    batches = build_batches(config, dataset, components.model, eod=0)
    return Tiny(config, context, components, batches)


def context_of(layout: ParallelLayout, rank: int = 0) -> ParallelContext:
    """The context that a rank would have, without the other ranks: good for building, not for
    communication."""
    groups = {}
    for axis, size in layout.sizes.items():
        if size > 1:
            ranks = layout.group_of(rank, axis)
            groups[axis,] = Group(ranks, ranks.index(rank))
    world = Group(range(layout.world_size), rank)
    return ParallelContext(
        layout=layout, device=torch.device("cpu"), world=world, control=world, groups=groups
    )


def settings_of(model: ModelConfig, layout: ParallelLayout | None = None, rank: int = 0, **options):
    """Layer settings of a rank, without the other ranks and with counter-based random numbers."""
    rng = options.pop("rng", CounterBasedRng.for_seed(options.pop("seed", 0)))
    context = context_of(layout or ParallelLayout(), rank)
    return LayerSettings(model, context, rng, **options)
