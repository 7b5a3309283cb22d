"""Replicas that must be equal are equal: a check against faulty memory, faulty hardware and missing reductions."""

import hashlib
from collections import Counter, defaultdict

import torch

from megalite.parallel.collectives import gather_objects
from megalite.parallel.context import ParallelContext
from megalite.training.build import TrainingComponents


class ReplicasDiffer(RuntimeError):
    """Ranks that hold the same part of a parameter hold different values."""


def _digest(tensor: torch.Tensor) -> str:
    """A hash of the values, bit by bit."""
    data = tensor.detach().contiguous().cpu().view(torch.uint8).numpy()
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def check_replicas(parts: TrainingComponents, context: ParallelContext, iteration: int) -> None:
    """Compare hashes of all parameters, and of the optimizer's master weights and moments, among the ranks that hold
    the same box of them: data replicas, tensor ranks of what is not split, first and last stage of a tied embedding.
    Collective over the world.

    Raises ReplicasDiffer on every rank; rank 0's names tensors and ranks, with more than two replicas the odd ones out.
    """
    parameters = parts.model.parameters_by_name
    tensors = [(name, name, parameter) for name, parameter in parameters.items()]
    tensors += [
        (f"optimizer.{kind}.{name}", name, tensor) for kind, name, tensor in parts.optimizer.state()
    ]
    mine = {}
    for title, name, tensor in tensors:
        spec = parameters[name].spec
        if spec.box.numel:
            mine[title, spec.box.offset] = _digest(spec.real(tensor))
    held = defaultdict(dict)
    for rank, digests in enumerate(gather_objects(mine, context.control)):
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
    if problems and context.rank > 0:
        raise ReplicasDiffer(
            f"after iteration {iteration}, replicas are not equal: see rank 0's message"
        )
    if problems:
        shown = "\n  ".join(problems[:20]) + (
            f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        )
        raise ReplicasDiffer(
            f"after iteration {iteration}, replicas of {len(problems)} tensor part(s) are not equal to the bit:\n  "
            f"{shown}\nSuspect the memory of those ranks' devices, or code that changes weights on some ranks only. "
            "Every checkpoint was checked before it was saved: resume from the last one."
        )


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks}"
