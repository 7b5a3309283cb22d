"""Check that replicas are bitwise equal: finds faulty memory, hardware and missing reductions."""

import hashlib
from collections import Counter, defaultdict

import torch

from megalite.checkpoint.folder import listing
from megalite.nn.parameter import held_boxes
from megalite.parallel.collectives import gather_objects
from megalite.system.errors import ReportedError
from megalite.training.build import TrainingComponents


class ReplicasDiffer(ReportedError, RuntimeError):
    """Ranks that hold the same shard of a parameter hold different values."""


def _digest(tensor: torch.Tensor) -> str:
    """A hash of all bits of the values."""
    data = tensor.detach().contiguous().cpu().view(torch.uint8).numpy()
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def check_replicas(parts: TrainingComponents, iteration: int) -> None:
    """Compare hashes of parameters, master weights and moments among the ranks that hold the same
    box of them: data replicas, tensor ranks of what is not sharded over them, first and last stage
    of a tied embedding. Collective over the world.

    Raises ReplicasDiffer on every rank. Rank 0's names the tensors and ranks; with more than two
    replicas, the ranks that differ from the majority.
    """
    # Which ranks hold which digest of each shard.
    context = parts.model.context
    held = defaultdict(dict)
    for rank, digests in enumerate(gather_objects(_digests(parts), context.control)):
        for shard, digest in digests.items():
            held[shard][rank] = digest
    problems = []
    for (name, offset), by_rank in sorted(held.items()):
        if difference := _difference(by_rank):
            problems.append(f"{name} at {offset}: {difference}")
    after = f"after iteration {iteration}, replicas"
    if problems and context.rank > 0:
        raise ReplicasDiffer(f"{after} are not equal: see rank 0's message")
    if problems:
        heading = f"{after} of {len(problems)} shard(s) are not equal:"
        raise ReplicasDiffer(
            f"{listing(heading, problems)}\nSuspect the memory of those ranks' devices, or code "
            "that changes weights on some ranks only. Every checkpoint was checked before it was "
            "saved: resume from the last one."
        )


def _digests(parts: TrainingComponents) -> dict[tuple[str, tuple[int, ...]], str]:
    """Digest of each shard that this rank holds, by its name and offset."""
    parameters = parts.model.parameters_by_name
    parts.optimizer.wait_for_parameters()
    tensors = []
    for name, tensor, elements in parts.optimizer.weights():
        tensors.append((name, held_boxes(parameters[name], tensor.detach(), elements)))
    for kind, name, tensor in parts.optimizer.state():
        held = held_boxes(parameters[name], tensor, parts.optimizer.ranges[name])
        tensors.append((f"optimizer.{kind}.{name}", held))
    digests = {}
    for title, held in tensors:
        for box, values in held:
            digests[title, box.offset] = _digest(values)
    return digests


def _difference(by_rank: dict[int, str]) -> str:
    """Which ranks' digests differ, in words; an empty string when all are equal."""
    counts = Counter(by_rank.values())
    if len(counts) == 1:
        return ""
    usual, votes = counts.most_common(1)[0]
    if votes <= len(by_rank) / 2:
        return f"ranks {list(by_rank)} do not agree"
    odd = [rank for rank, digest in by_rank.items() if digest != usual]
    named = f"rank {odd[0]}" if len(odd) == 1 else f"ranks {odd}"
    return f"{named} differ(s) from the other {votes} of ranks {list(by_rank)}"
