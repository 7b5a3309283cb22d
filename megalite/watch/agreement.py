"""Checks that all ranks were started alike, through the store, and see the same files."""

import json
import os
import time
from collections.abc import Mapping
from typing import Any

from megalite.parallel.collectives import gather_objects
from megalite.parallel.context import ParallelContext
from megalite.parallel.launch import OTHERS_FIRST_SECONDS
from megalite.system.errors import ReportedError

LINGER_SECONDS = 10.0
"""How long rank 0, whose process may hold the store, waits for the others to read the result."""


class RanksDiffer(ReportedError, RuntimeError):
    """Ranks have different configurations, versions or files.

    Rank 0's message names ranks and values. The other ranks' messages are empty, so that it is
    printed once.
    """


def compare_facts(store: Any, rank: int, world_size: int, facts: Mapping[str, Any]) -> None:
    """Raise RanksDiffer on every rank unless all have the same facts (JSON values). Collective."""
    # Each rank compares its facts with rank 0's and publishes the difference.
    facts = json.loads(json.dumps(dict(facts)))
    if rank == 0:
        store.set("facts", json.dumps(facts))
    first = json.loads(store.get("facts"))
    differences = []
    for key in {**first, **facts}:
        own = facts.get(key)
        expected = first.get(key)
        if own != expected:
            differences.append(f"{key} {own!r} (rank 0: {expected!r})")
    host = os.uname().nodename
    store.set(f"facts/{rank}", json.dumps([host, "; ".join(differences)]))

    # Rank 0 sums them up for all.
    if rank == 0:
        reports = []
        for other in range(world_size):
            reports.append(json.loads(store.get(f"facts/{other}")))
        store.set("facts/verdict", _summary(reports))
    verdict = store.get("facts/verdict").decode()
    readers = store.add("facts/read", 1)
    if not verdict:
        return

    # Rank 0 keeps the store until all have read the result, and is still the first to end.
    end = time.monotonic() + LINGER_SECONDS
    while rank == 0 and readers < world_size and time.monotonic() < end:
        time.sleep(0.01)
        readers = store.add("facts/read", 0)
    if rank:
        time.sleep(OTHERS_FIRST_SECONDS)
    raise RanksDiffer(verdict if rank == 0 else "")


def _summary(reports: list[list[str]]) -> str:
    """Every difference once, with its ranks; "" without any. reports: (host, difference)."""
    ranks: dict[tuple[str, str], list[str]] = {}
    for rank, (host, difference) in enumerate(reports):
        if difference:
            ranks.setdefault((host, difference), []).append(str(rank))
    if not ranks:
        return ""
    lines = []
    for (host, difference), numbers in ranks.items():
        lines.append(f"rank(s) {', '.join(numbers)} on {host}: {difference}")
    return "ranks were not started alike; " + "; ".join(lines)


def require_agreement(agrees: bool, problem: str, context: ParallelContext) -> None:
    """Raise RanksDiffer on every rank unless each agrees. Collective.

    Rank 0's message is `problem`, followed by the ranks that do not agree and their hosts.
    """
    ranks_of: dict[str, list[str]] = {}
    for rank, (host, fine) in enumerate(gather_objects((context.host, agrees), context.control)):
        if not fine:
            ranks_of.setdefault(host, []).append(str(rank))
    if ranks_of:
        where = []
        for host, ranks in ranks_of.items():
            where.append(f"rank(s) {', '.join(ranks)} on {host}")
        raise RanksDiffer(f"{problem} {'; '.join(where)}" if context.rank == 0 else "")
