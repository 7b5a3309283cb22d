"""Checks before the first step: every node sees the same files, and no rank is slow."""

import hashlib
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from megalite.checkpoint.fence import OWNER_FILE, Lease
from megalite.parallel.collectives import all_reduce, barrier, gather_objects
from megalite.parallel.context import ParallelContext
from megalite.watch.agreement import RanksDiffer

SLOW = 1.5
"""Times the median: above it, a rank is named."""
ROUNDS = 5
"""Measurements of each kind, of which the fastest counts."""


def take_lease(save: str | None, context: ParallelContext) -> Lease | None:
    """Lease --save for this run, on rank 0, and see that every node finds that lease there. Collective.

    Raises RanksDiffer when a rank does not see it, CheckpointError when another run has claimed it meanwhile, OSError
    when nothing can be written.
    """
    lease = Lease.take(save) if save is not None and context.rank == 0 else None
    if save is not None:
        token = gather_objects(lease and lease.token, context.control)[0]
        try:
            seen = json.loads((Path(save) / OWNER_FILE).read_text())["token"] == token
        except (OSError, ValueError):
            seen = False
        if lease is not None:
            lease.check()  # of two runs that start at once, one is replaced already
        _all_agree(
            seen,
            f"--save {save} is not one folder that all nodes share: what rank 0 wrote is missing for",
            context,
        )
    return lease


def check_data(states: dict, context: ParallelContext) -> None:
    """See that every rank reads the same data: `states` describe it. Collective; raises RanksDiffer."""
    digest = hashlib.sha256(json.dumps(states, sort_keys=True).encode()).hexdigest()
    first = gather_objects(digest, context.control)[0]
    _all_agree(
        digest == first,
        "the training data is not the same on all nodes: it has other contents than rank 0's for",
        context,
    )


def _all_agree(agrees: bool, problem: str, context: ParallelContext) -> None:
    told = gather_objects((context.host, agrees), context.control)
    hosts = {}
    for rank, (host, right) in enumerate(told):
        if not right:
            hosts.setdefault(host, []).append(str(rank))
    if hosts:
        where = "; ".join(f"rank(s) {', '.join(ranks)} on {host}" for host, ranks in hosts.items())
        raise RanksDiffer(f"{problem} {where}" if context.rank == 0 else "")


def check_stragglers(context: ParallelContext, say: Callable[[str], None]) -> None:
    """Time a product on each rank and an all-reduce of each group, and name those far above the median. Collective."""
    size, dtype = (8192, torch.bfloat16) if context.device.type == "cuda" else (512, torch.float32)
    factor = torch.ones(size, size, dtype=dtype, device=context.device)
    content = torch.ones(1 << 20, device=context.device)
    times = {f"a product of {size} x {size} matrices": _fastest(lambda: factor @ factor, context)}
    for group in (context.tensor, context.data, context.pipeline):
        if group.size > 1:
            name = f"an all-reduce of 4 MiB in the {group.name} group"
            times[name] = _fastest(lambda group=group: all_reduce(content, group), context)
    told = gather_objects((context.host, times), context.control)
    say("\n".join(compare_times(told)))


def compare_times(told: list[tuple[str, dict[str, float]]]) -> list[str]:
    """Lines that name the ranks far above the median, from each rank's host and seconds of each kind of work."""
    lines, slow = [], []
    for kind in told[0][1]:
        by_rank = [1000 * mine[kind] for _, mine in told]
        median = statistics.median_low(
            by_rank
        )  # of two nodes one may be slow: the mean of both would hide it
        lines.append(f"{kind}: median {median:.2f} ms, slowest {max(by_rank):.2f} ms")
        slow += [
            f"SLOW: rank {rank} on {told[rank][0]}: {ms:.2f} ms, {ms / median:.1f} times the median, for {kind}"
            for rank, ms in enumerate(by_rank)
            if ms > SLOW * median
        ]
    return lines + (slow or [f"no stragglers: no rank takes more than {SLOW} times the median"])


def _fastest(action: Callable, context: ParallelContext) -> float:
    """Seconds of the fastest of some rounds, each begun by all ranks together."""
    found = []
    for _ in range(1 + ROUNDS):  # the first one warms up
        barrier(context.control)
        began = time.perf_counter()
        action()
        if context.device.type == "cuda":
            torch.cuda.synchronize(context.device)
        found.append(time.perf_counter() - began)
    return min(found[1:])
