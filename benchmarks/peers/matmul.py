"""Matrix products alone, as a contender in `training.py --peers`: the peak that the others are
compared with."""

import torch
from rank import Shape, serve

SIZE = 1024
FLOPS = 2 * SIZE**3
"""Of a step of one rank."""


def prepare(variant: str, shape: Shape):
    """One fp32 product [n, n] x [n, n]."""
    left, right, out = torch.randn(3, SIZE, SIZE)

    def step() -> None:
        torch.mm(left, right, out=out)

    return step


if __name__ == "__main__":
    serve(prepare)
