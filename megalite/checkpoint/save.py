"""Write a checkpoint: every rank its own file, one commit for all, nothing half-done ever visible."""

import json
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from megalite.checkpoint.fence import Lease
from megalite.checkpoint.folder import (
    INDEX_FILE,
    LATEST_FILE,
    STATE_FILE,
    CheckpointError,
    fsync_folder,
    iteration_folder,
    list_iterations,
    replaced_folders,
)
from megalite.checkpoint.format import (
    CONFIG_FILE,
    PRIVATE_PREFIX,
    Index,
    Shard,
    StoredBox,
    StoredFile,
    StoredTensor,
    listing,
    rank_file,
    write_file,
    write_tensors,
)
from megalite.parallel.collectives import Group, gather_objects


def write(
    root: str | Path,
    iteration: int,
    pieces: Iterable[Shard],
    private: dict[str, torch.Tensor],
    state: dict,
    config_yaml: str,
    world: Group,
    keep_last: int | None = None,
    lease: Lease | None = None,
) -> Path:
    """Write the checkpoint `root/iter_N` and make it the latest; every rank of `world` calls this. Returns its folder.

    Together the ranks' pieces must cover every named tensor exactly once. `private` tensors belong to this rank alone
    (random streams). `state` (JSON), `config_yaml` and `keep_last` are taken from rank 0; `keep_last` removes all but
    that many newest checkpoints, counted up to this one. `root` must be the same folder on every rank. `lease` is rank
    0's; without one it claims `root` now.

    Raises CheckpointError on every rank when any rank fails, or another run has claimed `root`; the previous checkpoint
    then stays the latest.
    """
    lease = _on_first(world, lambda: lease or Lease.take(root))
    try:
        draft, texts = _on_first(
            world, lambda: _begin(lease, iteration, state, config_yaml, keep_last)
        )
        parts = _on_all(world, lambda: _write_part(draft, world.rank, pieces, private))
        _on_first(world, lambda: _commit(lease, draft, iteration, parts, texts))
    except CheckpointError:
        _on_first(world, lambda: _give_up(lease))
        raise
    # The others wait here, where a long deletion is not taken for a hang.
    _on_first(world, lambda: _prune(lease, iteration, keep_last))
    return lease.root / iteration_folder(iteration)


@dataclass(frozen=True)
class _Part:
    """What one rank wrote: the boxes of its tensors, and its file."""

    tensors: dict[str, StoredTensor]
    file: StoredFile


def _on_all(world: Group, action: Callable) -> list:
    """Run `action` on every rank and return all results; when it fails anywhere, raise on every rank."""
    result, failure = None, None
    try:
        result = action()
    except (
        Exception
    ) as error:  # whatever it is, the other ranks wait for the outcome below and must learn of it
        failure = error
    outcomes = gather_objects((result, failure and _describe(failure)), world)
    reasons = [f"rank {rank}: {reason}" for rank, (_, reason) in enumerate(outcomes) if reason]
    if reasons:
        raise CheckpointError("checkpoint not written; " + "; ".join(reasons)) from failure
    return [result for result, _ in outcomes]


def _on_first(world: Group, action: Callable):
    """Run `action` on rank 0 and return its result everywhere; when it fails, raise on every rank."""
    return _on_all(world, action if world.rank == 0 else lambda: None)[0]


def _describe(error: Exception) -> str:
    return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"


def _begin(
    lease: Lease, iteration: int, state: dict, config_yaml: str, keep_last: int | None
) -> tuple[Path, dict[str, str]]:
    """Make the draft folder on the owner's staging_dir. Returns it, and the contents of its text files."""
    texts = {STATE_FILE: json.dumps(state, indent=1), CONFIG_FILE: config_yaml}
    if keep_last is not None and keep_last < 1:
        raise CheckpointError(f"keep_last must be at least 1, or None to keep all; got {keep_last}")
    lease.clear()
    draft = lease.staging_dir / iteration_folder(iteration)
    draft.mkdir()
    return draft, texts


def _give_up(lease: Lease) -> None:
    """Remove the draft. Raises CheckpointError when the run was replaced: that is then the reason."""
    with suppress(OSError, ValueError):
        lease.check()
        lease.clear()


def _write_part(
    draft: Path, rank: int, pieces: Iterable[Shard], private: dict[str, torch.Tensor]
) -> _Part:
    tensors = {PRIVATE_PREFIX + name: tensor for name, tensor in private.items()}
    stored: dict[str, StoredTensor] = {}
    for piece in pieces:
        known = stored.get(piece.name)
        boxes = known.boxes if known else ()
        if piece.box.numel:
            key = f"{piece.name}@{len(boxes)}" if boxes else piece.name
            tensors[key] = piece.tensor
            boxes += (StoredBox(rank_file(rank), key, piece.box),)
        # An empty piece is noted too: a tensor of which all ranks hold nothing is then missed by name.
        stored[piece.name] = StoredTensor(piece.tensor.dtype, tuple(piece.global_shape), boxes)
    return _Part(stored, write_tensors(draft / rank_file(rank), tensors))


def _merge(parts: list[_Part]) -> dict[str, StoredTensor]:
    """Join the ranks' boxes. Raises CheckpointError unless they cover every tensor exactly once."""
    merged: dict[str, StoredTensor] = {}
    problems = []
    for rank, part in enumerate(parts):
        for name, tensor in part.tensors.items():
            known = merged.setdefault(name, StoredTensor(tensor.dtype, tensor.shape, ()))
            if (known.dtype, known.shape) != (tensor.dtype, tensor.shape):
                here, there = (tensor.dtype, tensor.shape), (known.dtype, known.shape)
                problems.append(f"{name}: rank {rank} says {here}, an earlier rank {there}")
            merged[name] = StoredTensor(known.dtype, known.shape, known.boxes + tensor.boxes)
    problems += [problem for name, tensor in merged.items() for problem in tensor.problems(name)]
    if problems:
        raise CheckpointError(listing("the ranks' pieces do not fit together:", problems))
    return merged


def _commit(
    lease: Lease, draft: Path, iteration: int, parts: list[_Part], texts: dict[str, str]
) -> None:
    """Write text files and index, then rename: draft to folder, and the name of the latest last."""
    root = lease.root
    files = {name: write_file(draft / name, [text.encode()]) for name, text in texts.items()}
    files |= {rank_file(rank): part.file for rank, part in enumerate(parts)}
    index = Index(iteration, len(parts), _merge(parts), files)
    for name, file in files.items():
        path = draft / name
        if not path.exists() or path.stat().st_size != file.bytes:
            raise CheckpointError(
                f"{path} is not there as it was written: is {root} the same folder on every node?"
            )
    write_file(draft / INDEX_FILE, [index.to_json().encode()])
    fsync_folder(draft)
    fresh = lease.staging_dir / LATEST_FILE
    write_file(fresh, [f"{iteration}\n".encode()])
    _move_in(lease, draft, iteration)
    fsync_folder(root)
    os.replace(fresh, root / LATEST_FILE)
    fsync_folder(root)


def _move_in(lease: Lease, draft: Path, iteration: int) -> None:
    """Rename the draft to `iter_N`. What stands there is kept under the next free name, `iter_N.replaced-K`.

    Should that be the latest and the run be killed right now, readers still find it: the highest K stands in for a
    missing `iter_N`.
    """
    root, folder = lease.root, lease.root / iteration_folder(iteration)
    if not folder.exists():
        os.rename(draft, folder)
        return
    replaced = replaced_folders(root, iteration)
    number = 1 + int(replaced[-1].name.rpartition("-")[2]) if replaced else 1
    # This path leads through the draft: it does not exist for a run that was replaced, whose successor's folder it is.
    here = draft / os.pardir / os.pardir
    name, aside = folder.name, f"{folder.name}.replaced-{number}"
    os.rename(here / name, here / aside)
    try:
        fsync_folder(root)
        os.rename(draft, folder)
    except OSError:
        with suppress(OSError):
            os.rename(here / aside, here / name)
        raise
    print(f"checkpoint: {folder} existed already and was moved to {aside}", flush=True)


def _prune(lease: Lease, latest: int, keep_last: int | None) -> None:
    """Remove all but the `keep_last` newest checkpoints up to `latest`; later ones (an older branch) are left alone."""
    if keep_last is None:
        return
    try:
        for iteration in [number for number in list_iterations(lease.root) if number <= latest][
            :-keep_last
        ]:
            # Renamed first: a kill in the middle of the deletion leaves nothing that looks like a checkpoint.
            os.rename(
                lease.root / iteration_folder(iteration),
                lease.staging_dir / iteration_folder(iteration),
            )
        lease.clear()
    except OSError as error:
        print(
            f"checkpoint: could not remove what is older than the last {keep_last}: {error}",
            flush=True,
        )
