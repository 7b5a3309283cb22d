"""megalite as a contender in `training.py --peers`."""

import functools
import os
import sys
from pathlib import Path

from rank import Shape, serve

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megalite.config.run import RunConfig, from_flat
from megalite.data.mock import MockDataset
from megalite.parallel.context import ParallelContext
from megalite.parallel.launch import detect
from megalite.training.batches import build_batches
from megalite.training.build import build_components, build_context

TENSOR = {"tensor_model_parallel_size": 2}
PIPELINE = {"pipeline_model_parallel_size": 2}
LAYOUTS = {
    "single": {},
    "dp2": {},
    "dp2-zero1": {"use_distributed_optimizer": True},
    "tp2": TENSOR,
    "tp2-sp": TENSOR | {"sequence_parallel": True},
    "pp2": PIPELINE,
    "tp2pp2dp2": TENSOR | PIPELINE,
}
SCHEDULES = ("1f1b", "gpipe", "interleaved", "zb-h1", "zb-v")
for ranks in (1, 2, 4):
    for name in SCHEDULES:
        flags = {"pipeline_model_parallel_size": ranks, "pipeline_schedule": name}
        LAYOUTS[f"pp{ranks}-{name}"] = flags


def layout_config(
    layout: str, shape: Shape, world_size: int, clip_grad: float = 0.0, dropout: float = 0.0
) -> RunConfig:
    """The configuration of a row of the table."""
    flags = LAYOUTS[layout]
    tensor = flags.get("tensor_model_parallel_size", 1)
    data_parallel = world_size // (tensor * flags.get("pipeline_model_parallel_size", 1))
    return from_flat(
        {
            "num_layers": shape.layers,
            "hidden_size": shape.hidden,
            "num_attention_heads": shape.heads,
            "seq_length": shape.seq,
            "vocab_size": shape.vocab,
            "untie_embeddings_and_output_weights": True,
            "attention_dropout": dropout,
            "hidden_dropout": dropout,
            "micro_batch_size": shape.micro_batch,
            "global_batch_size": shape.micro_batch * shape.microbatches * data_parallel,
            "mock_data": True,
            "train_iters": 1000,
            "lr": 1e-4,
            "lr_decay_style": "constant",
            "clip_grad": clip_grad,
            "device": "cpu",
            **flags,
        }
    )


def our_parts(config: RunConfig, context: ParallelContext):
    """(model, engine and optimizer; its data) of megalite."""
    parts = build_components(config, context)
    dataset = MockDataset(config.model.vocab_size, config.model.seq_length, 1, "train")
    return parts, build_batches(config, dataset, parts.model)


def our_step(config: RunConfig, context: ParallelContext):
    """(step function that returns this rank's part of the loss, the model) of megalite."""
    parts, data = our_parts(config, context)
    taken = 0

    def step() -> float:
        nonlocal taken
        parts.optimizer.gradients.zero()
        loss = parts.engine.train_step(*data.at(taken * config.data.global_batch_size))
        taken += 1
        parts.optimizer.step(taken)
        return loss.item()

    return step, parts.model


def prepare(layout: str, shape: Shape):
    """The training step of a layout; of "schedules", one that is called with a schedule, each of
    which has a model of its own."""
    launch = detect(os.environ)
    ranks = launch.world_size
    several = layout == "schedules"
    first = layout_config(f"pp{ranks}-1f1b" if several else layout, shape, ranks)
    context, _ = build_context(first, launch)

    @functools.cache
    def built(schedule: str):
        config = layout_config(f"pp{ranks}-{schedule}", shape, ranks) if several else first
        return our_step(config, context)

    def step_with_loss(schedule: str = "") -> float | None:
        step, model = built(schedule)
        loss = step() * context.data.size
        return loss if model.is_last else None

    return step_with_loss


if __name__ == "__main__":
    serve(prepare)
