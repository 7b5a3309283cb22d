"""Checks that all ranks were started alike, through the store, and see the same files."""

import json
import os
import time
from collections.abc import Iterable, Mapping
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
    problem = f"{os.uname().nodename}: {'; '.join(differences)}" if differences else ""
    store.set(f"facts/{rank}", problem)

    # Rank 0 sums them up for all.
    if rank == 0:
        problems = _by_rank(store.get(f"facts/{other}").decode() for other in range(world_size))
        store.set("facts/verdict", problems and f"ranks were not started alike; {problems}")
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


def _by_rank(problems: Iterable[str]) -> str:
    """`rank(s) 1, 2 on PROBLEM; ...`, each problem once, from those of all ranks in order; "" where
    all are ""."""
    ranks: dict[str, list[str]] = {}
    for rank, problem in enumerate(problems):
        if problem:
            ranks.setdefault(problem, []).append(str(rank))
    return "; ".join(f"rank(s) {', '.join(who)} on {problem}" for problem, who in ranks.items())


def require_agreement(agrees: bool, problem: str, context: ParallelContext) -> None:
    """Raise RanksDiffer on every rank unless each agrees. Collective.

    Rank 0's message is `problem`, followed by the ranks that do not agree and their hosts.
    """
    odd = _by_rank(gather_objects("" if agrees else context.host, context.control))
    if odd:
        raise RanksDiffer(f"{problem} {odd}" if context.rank == 0 else "")
