"""Checks before the first step: every node sees the same --save and the same data."""

import hashlib
import json
from pathlib import Path

from megalite.checkpoint.fence import OWNER_FILE, Lease
from megalite.parallel.collectives import gather_objects
from megalite.parallel.context import ParallelContext
from megalite.watch.agreement import require_agreement


def take_lease(save: str | None, context: ParallelContext) -> Lease | None:
    """Lease --save for this run, on rank 0, and see that every node finds the lease. Collective.

    Raises RanksDiffer when a rank does not see it, CheckpointError when another run has taken the
    lease meanwhile, OSError when nothing can be written.
    """
    if save is None:
        return None
    lease = Lease.take(save) if context.rank == 0 else None
    token = gather_objects(lease and lease.token, context.control)[0]
    try:
        seen = json.loads((Path(save) / OWNER_FILE).read_text())["token"] == token
    except (OSError, ValueError):
        seen = False
    if lease is not None:
        lease.check()  # of two runs that start at once, one is replaced already
    problem = f"--save {save} is not one folder that all nodes share"
    require_agreement(seen, f"{problem}: what rank 0 wrote is missing for", context)
    return lease


def check_data(states: dict, context: ParallelContext) -> None:
    """Raise RanksDiffer unless all ranks read the data that `states` describe. Collective."""
    digest = hashlib.sha256(json.dumps(states, sort_keys=True).encode()).hexdigest()
    first = gather_objects(digest, context.control)[0]
    problem = "the training data is not the same on all nodes"
    same = digest == first
    require_agreement(same, f"{problem}: it has other contents than rank 0's for", context)
