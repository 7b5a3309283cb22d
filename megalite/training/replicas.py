"""Replicas that must be equal are equal: a check against faulty memory, faulty hardware and missing reductions."""

import hashlib
from collections import Counter, defaultdict

import torch

from megalite.parallel.collectives import gather_objects
from megalite.parallel.context import ParallelContext


class ReplicasDiffer(RuntimeError):
    """Ranks that hold the same part of a parameter hold different values."""


def _digest(tensor: torch.Tensor) -> str:
    """A hash of the values, bit by bit."""
    data = tensor.detach().contiguous().cpu().view(torch.uint8).numpy()
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def check_replicas(parameters: dict[str, torch.nn.Parameter], context: ParallelContext, iteration: int) -> None:
    """Compare hashes of all parameters among the ranks that hold the same box of them: data replicas, tensor ranks of
    what is not split, first and last stage of a tied embedding. Collective over the world.

    Raises ReplicasDiffer on every rank, naming parameters and ranks; with more than two replicas the odd ones out.
    """
    mine = {(name, p.spec.box.offset): _digest(p.spec.real(p)) for name, p in parameters.items() if p.spec.box.numel}
    held = defaultdict(dict)
    for rank, digests in enumerate(gather_objects(mine, context.world)):
        for part, digest in digests.items():
            held[part][rank] = digest
    problems = []
    for (name, offset), by_rank in sorted(held.items()):
        counts = Counter(by_rank.values())
        if len(counts) == 1:
            continue
        usual, votes = counts.most_common(1)[0]
        if votes > len(by_rank) / 2:
            odd = [rank for rank, digest in by_rank.items() if digest != usual]
            problems.append(
                f"{name} at {offset}: {_ranks(odd)} differ(s) from the other {votes} of ranks {list(by_rank)}"
            )
        else:
            problems.append(f"{name} at {offset}: ranks {list(by_rank)} do not agree")
    if problems:
        shown = "\n  ".join(problems[:20]) + (f"\n  and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise ReplicasDiffer(
            f"after iteration {iteration}, replicas of {len(problems)} parameter part(s) are not equal to the bit:\n  "
            f"{shown}\nSuspect the memory of those ranks' devices, or code that changes weights on some ranks only. "
            "Nothing was saved since: resume from a checkpoint that passed the check."
        )


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks}"
