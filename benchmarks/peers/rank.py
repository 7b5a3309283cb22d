"""A rank of a contender in `training.py --peers`: what all contenders share.

The driver (compare.py) starts one process for each rank, with torchrun's variables, and a line on
standard input for each measurement: the number of steps and, for a contender that can do several
things, which. The rank answers with one JSON line. Between two lines it sleeps, while the other
contenders are measured.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Shape:
    """The model and the batch, the same for all contenders of a row."""

    layers: int = 8
    hidden: int = 512
    heads: int = 8
    seq: int = 256
    vocab: int = 8192
    micro_batch: int = 4
    microbatches: int = 1
    """Of one data-parallel rank in a step."""


def random_batches(shape: Shape, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Microbatches without end: tokens and labels, int64 [b, s]."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        size = (shape.micro_batch, shape.seq + 1)
        rows = torch.randint(shape.vocab, size, generator=generator)
        yield rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def serve(prepare: Callable[[str, Shape], Callable[..., float | None]]) -> None:
    """Measure steps until standard input ends.

    Args:
        prepare: called with the variant and the shape, from the command line; returns a training
            step, which is called with the words that follow the number of steps and returns the
            mean loss of this rank's data if this rank knows it.
    """
    # Libraries print to standard output, which is for answers only.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    torch.manual_seed(1)
    step = prepare(sys.argv[1], Shape(**json.loads(sys.argv[2])))
    for line in sys.stdin:
        steps, *which = line.split()
        cpu = time.process_time()
        began = time.monotonic()  # one clock for all processes of a machine
        for _ in range(int(steps)):
            loss = step(*which)
        answer = {
            "began": began,
            "ended": time.monotonic(),
            "cpu_seconds": time.process_time() - cpu,
            "rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "loss": loss,
        }
        print(json.dumps(answer), file=answers, flush=True)
    os._exit(0)  # nothing is left to save, and libraries complain at length when they are torn down
