"""Slow ranks, found before the first step: the same work is timed on every rank."""

import statistics
import time
from collections.abc import Callable

import torch

from megalite.parallel.collectives import all_reduce, barrier, gather_objects
from megalite.parallel.context import ParallelContext

SLOW = 1.5
"""Ranks that take longer than this many times the median are reported."""
ROUNDS = 5
"""Measurements of each kind of work, of which the fastest counts."""


def check_stragglers(context: ParallelContext, say: Callable[[str], None]) -> None:
    """Time a product on each rank and an all-reduce of each group; name slow ranks. Collective."""
    size, dtype = 512, torch.float32
    if context.device.type == "cuda":
        size, dtype = 8192, torch.bfloat16
    factor = torch.ones(size, size, dtype=dtype, device=context.device)
    content = torch.ones(1 << 20, device=context.device)
    product = f"a product of {size} x {size} matrices"
    times = {product: _fastest(lambda: factor @ factor, context)}
    for group in (context.tensor, context.data, context.pipeline):
        if group.size > 1:
            name = f"an all-reduce of 4 MiB in the {group.name} group"
            times[name] = _fastest(lambda group=group: all_reduce(content, group), context)
    say("\n".join(compare_times(gather_objects((context.host, times), context.control))))


def compare_times(reports: list[tuple[str, dict[str, float]]]) -> list[str]:
    """Lines that name the ranks far above the median.

    reports: for each rank its host, and the seconds that each kind of work took.
    """
    lines = []
    slow = []
    for kind in reports[0][1]:
        milliseconds = []
        for _, seconds in reports:
            milliseconds.append(1000 * seconds[kind])
        # The lower median: of two nodes one may be slow, and the mean of both would hide it.
        median = statistics.median_low(milliseconds)
        lines.append(f"{kind}: median {median:.2f} ms, slowest {max(milliseconds):.2f} ms")
        for rank, ms in enumerate(milliseconds):
            if ms > SLOW * median:
                slow.append(
                    f"SLOW: rank {rank} on {reports[rank][0]}: {ms:.2f} ms, "
                    f"{ms / median:.1f} times the median, for {kind}"
                )
    return lines + (slow or [f"no stragglers: no rank takes more than {SLOW} times the median"])


def _fastest(action: Callable, context: ParallelContext) -> float:
    """Seconds of the fastest of some rounds, each begun by all ranks together."""
    rounds = []
    for _ in range(1 + ROUNDS):
        barrier(context.control)
        began = time.perf_counter()
        action()
        if context.device.type == "cuda":
            torch.cuda.synchronize(context.device)
        rounds.append(time.perf_counter() - began)
    return min(rounds[1:])  # the first one warms up
