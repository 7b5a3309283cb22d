"""How far the clocks of ranks are apart."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from megalite.parallel.collectives import Group, receive, send

ROUNDS = 20
"""Messages to each rank and back, of which the fastest counts."""


@dataclass(frozen=True)
class ClockOffset:
    """What is added to a rank's time to get the first rank's."""

    seconds: float = 0.0
    error: float = 0.0
    """The offset is wrong by at most this many seconds, at the moment at which it was measured."""


def clock_offset(
    group: Group, clock: Callable[[], float] = time.monotonic, rounds: int = ROUNDS
) -> ClockOffset:
    """Compare this rank's clock with that of the group's first rank. Collective, on CPU groups.

    A rank asks the first one for its time, at which half of the round trip has passed, give or take
    the other half (Cristian 1989, Probabilistic clock synchronization). The fastest round trip
    bounds the error best. The first rank answers one rank after the other.
    """
    answer = torch.zeros(1, dtype=torch.float64)
    if group.rank == 0:
        for other in range(1, group.size):
            for _ in range(rounds):
                receive(answer, other, group).wait()
                answer[0] = clock()
                send(answer, other, group).wait()
        return ClockOffset()
    fastest = ClockOffset(error=float("inf"))
    for _ in range(rounds):
        began = clock()
        send(answer, 0, group).wait()
        receive(answer, 0, group).wait()
        ended = clock()
        if (ended - began) / 2 < fastest.error:
            offset = answer.item() - (began + ended) / 2
            fastest = ClockOffset(offset, error=(ended - began) / 2)
    return fastest
