"""DeepSpeed's ZeRO stage 1 over the plain model, as a contender in `training.py --peers`.

At its first start DeepSpeed compiles an all-reduce in shared memory (about a minute; a C++ compiler
and ninja are needed). `make benchmark-peers` does that.
"""

import os

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import torch
from plain_gpt import cross_entropy, plain_gpt
from rank import Shape, random_batches, serve


def prepare(variant: str, shape: Shape):
    """The training step of two data-parallel ranks."""
    deepspeed.init_distributed("gloo", verbose=False)
    model = plain_gpt(shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01, fused=True)
    settings = {
        "train_micro_batch_size_per_gpu": shape.micro_batch,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    batches = random_batches(shape, seed=torch.distributed.get_rank())

    def step() -> float:
        tokens, labels = next(batches)
        loss = cross_entropy(engine(tokens), labels)
        engine.backward(loss)
        engine.step()
        return loss.item()

    return step


if __name__ == "__main__":
    serve(prepare)
