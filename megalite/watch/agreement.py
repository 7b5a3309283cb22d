"""What must be the same on every rank, compared through the store before any group exists. Imports no torch."""

import json
import os
import time
from collections.abc import Mapping
from typing import Any

LINGER_SECONDS = 10.0
"""Rank 0, in whose process the store may live, waits so long for the others to have read the verdict."""
OTHERS_FIRST_SECONDS = 1.0
"""The others let rank 0 speak first, so long: a launcher ends all when one has ended."""


class RanksDiffer(RuntimeError):
    """Ranks were started with different configurations, versions or files. Rank 0's message names ranks and values, the
    others' are empty, so that it is said once."""


def compare_facts(store: Any, rank: int, world_size: int, facts: Mapping[str, Any]) -> None:
    """Raise RanksDiffer on every rank when these facts (JSON) are not everywhere those of rank 0. Collective."""
    facts = json.loads(json.dumps(dict(facts)))
    if rank == 0:
        store.set("facts", json.dumps(facts))
    first = json.loads(store.get("facts"))
    differing = [key for key in {**first, **facts} if first.get(key) != facts.get(key)]
    mine = "; ".join(f"{key} {facts.get(key)!r} (rank 0: {first.get(key)!r})" for key in differing)
    store.set(f"facts/{rank}", json.dumps([os.uname().nodename, mine]))
    if rank == 0:
        told = [json.loads(store.get(f"facts/{other}")) for other in range(world_size)]
        store.set("facts/verdict", _in_words(told))
    verdict = store.get("facts/verdict").decode()
    read = store.add("facts/read", 1)
    if verdict:
        end = time.monotonic() + LINGER_SECONDS
        while rank == 0 and read < world_size and time.monotonic() < end:
            time.sleep(0.01)
            read = store.add("facts/read", 0)
        if rank:
            time.sleep(OTHERS_FIRST_SECONDS)
        raise RanksDiffer(verdict if rank == 0 else "")


def _in_words(told: list[list[str]]) -> str:
    """ "" when no rank differs; else every difference, once, with its ranks."""
    ranks: dict[tuple[str, str], list[str]] = {}
    for rank, (host, difference) in enumerate(told):
        if difference:
            ranks.setdefault((host, difference), []).append(str(rank))
    words = [f"rank(s) {', '.join(who)} on {host}: {what}" for (host, what), who in ranks.items()]
    return "ranks were not started alike; " + "; ".join(words) if words else ""
