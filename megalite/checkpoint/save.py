"""Write a checkpoint: one file per rank, one commit for all; an unfinished one is never visible."""

import json
import os
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from pathlib import Path

import torch

from megalite.checkpoint.fence import Lease
from megalite.checkpoint.folder import (
    CONFIG_FILE,
    INDEX_FILE,
    LATEST_FILE,
    STATE_FILE,
    CheckpointError,
    fsync_folder,
    iteration_folder,
    list_iterations,
    listing,
    replaced_folders,
)
from megalite.checkpoint.format import (
    PRIVATE_PREFIX,
    Index,
    Shard,
    StoredFile,
    StoredShard,
    StoredTensor,
    rank_file,
    shard_key,
)
from megalite.checkpoint.tensor_file import write_file, write_tensors
from megalite.parallel.boxes import Box
from megalite.parallel.collectives import Group, gather_objects, gather_objects_to_first
from megalite.system.errors import error_message


def write(
    root: str | Path,
    iteration: int,
    shards: Iterable[Shard],
    private: dict[str, torch.Tensor],
    state: dict,
    config_yaml: str,
    world: Group,
    keep_last: int | None = None,
    lease: Lease | None = None,
    keep_every: int | None = None,
    history: Collection[int] | None = None,
) -> Path:
    """Write the checkpoint `root/iter_N` and make it the latest. Returns its folder. Collective.

    Together the ranks' shards must cover every named tensor exactly once. `private` tensors belong
    to this rank alone (random streams). `state` (JSON), `config_yaml`, `keep_last` and `keep_every`
    are taken from rank 0. With `keep_last`, older checkpoints than that many newest, counted up to
    this one, are removed, unless their iteration is a multiple of `keep_every`; with `keep_every`
    alone, `keep_last` is 1. Only checkpoints of `history` are counted and removed: the iterations
    that this run passed through before; None: all lower ones. It is taken from rank 0, too.
    `root` must be the same folder on every rank. `lease` is rank 0's; without one, rank 0 takes the
    lease of `root` now.

    Raises CheckpointError on every rank when any rank fails, or another run has taken the lease;
    the previous checkpoint then stays the latest.
    """
    lease = _on_first(world, lambda: lease or Lease.take(root))
    try:
        draft = _on_first(world, lambda: _begin(lease, iteration, keep_last, keep_every))
        own = _on_all(world, lambda: _write_rank(draft, world.rank, shards, private))
        written = gather_objects_to_first(own, world)
        _on_first(
            world, lambda: _commit(lease, draft, iteration, written, _texts(state, config_yaml))
        )
    except CheckpointError:
        _on_first(world, lambda: _give_up(lease))
        raise
    # The others wait here, where a long deletion is not taken for a hang.
    _on_first(world, lambda: _prune(lease, iteration, keep_last, keep_every, history))
    return lease.root / iteration_folder(iteration)


def _on_all(world: Group, action: Callable):
    """Run `action` on every rank and return its result.

    When it fails on any rank, raises CheckpointError with the reasons on every rank.
    """
    result, failure = _attempt(action)
    _raise_agreed(gather_objects(failure and _describe(failure), world), failure)
    return result


def _on_first(world: Group, action: Callable):
    """Run `action` on rank 0 and return its result on every rank, or raise there as _on_all."""
    result, failure = _attempt(action) if world.rank == 0 else (None, None)
    result, problem = gather_objects((result, failure and _describe(failure)), world)[0]
    _raise_agreed([problem], failure)
    return result


def _attempt(action: Callable) -> tuple:
    """(its result or None, why it failed or None)."""
    try:
        return action(), None
    except Exception as error:  # of any kind: the other ranks wait and must learn of it
        return None, error


def _raise_agreed(problems: list[str | None], failure: Exception | None) -> None:
    """Raise CheckpointError when there are problems; they are in the order of ranks. failure: this
    rank's own."""
    reasons = [f"rank {rank}: {problem}" for rank, problem in enumerate(problems) if problem]
    if reasons:
        raise CheckpointError("checkpoint not written; " + "; ".join(reasons)) from failure


def _describe(error: Exception) -> str:
    message = error_message(error)
    return message if isinstance(error, CheckpointError) else f"{type(error).__name__}: {message}"


def _begin(lease: Lease, iteration: int, keep_last: int | None, keep_every: int | None) -> Path:
    """Make the draft folder in the owner's staging directory, and return it."""
    for name, number in (("keep_last", keep_last), ("keep_every", keep_every)):
        if number is not None and number < 1:
            raise CheckpointError(f"{name} must be at least 1, or None to keep all; got {number}")
    lease.clear()
    draft = lease.staging_dir / iteration_folder(iteration)
    draft.mkdir()
    return draft


def _give_up(lease: Lease) -> None:
    """Remove the draft. Raises CheckpointError when the run was replaced: then that is the reason
    of the failure."""
    with suppress(OSError, ValueError):
        lease.check()
        lease.clear()


def _write_rank(
    draft: Path, rank: int, shards: Iterable[Shard], private: dict[str, torch.Tensor]
) -> tuple[dict[str, StoredTensor], StoredFile]:
    """Write this rank's file: its shards and its private tensors. Returns the tensors of which it
    holds shards, and the file."""
    file_name = rank_file(rank)
    tensors = {PRIVATE_PREFIX + name: tensor for name, tensor in private.items()}
    kinds: dict[str, tuple] = {}
    boxes: dict[str, list[Box]] = {}
    for shard in shards:
        # An empty shard is recorded too: a tensor of which every rank holds nothing is then
        # reported as not covered.
        kinds[shard.name] = (shard.tensor.dtype, tuple(shard.global_shape))
        held = boxes.setdefault(shard.name, [])
        if shard.box.numel:
            tensors[shard_key(shard.name, len(held))] = shard.tensor
            held.append(shard.box)
    file, checksums = write_tensors(draft / file_name, tensors)
    stored = {}
    for name, held in boxes.items():
        keys = [shard_key(name, number) for number in range(len(held))]
        of_name = [StoredShard(file_name, key, box, checksums[key]) for key, box in zip(keys, held)]
        stored[name] = StoredTensor(*kinds[name], tuple(of_name))
    return stored, file


def _merge(written: Iterable[dict[str, StoredTensor]]) -> dict[str, StoredTensor]:
    """Join the ranks' shards. Raises CheckpointError unless they cover each tensor exactly once."""
    kinds: dict[str, tuple] = {}
    shards: dict[str, list[StoredShard]] = {}
    problems = []
    for rank, tensors in enumerate(written):
        for name, tensor in tensors.items():
            here = (tensor.dtype, tensor.shape)
            there = kinds.setdefault(name, here)
            if here != there:
                problems.append(f"{name}: rank {rank} says {here}, an earlier rank {there}")
            shards.setdefault(name, []).extend(tensor.shards)
    merged = {}
    for name, (dtype, shape) in kinds.items():
        merged[name] = StoredTensor(dtype, shape, tuple(shards[name]))
    if not problems:  # else shards may lie outside of what the first rank says of the tensor
        for name, tensor in merged.items():
            problems += tensor.problems(name)
    if problems:
        raise CheckpointError(listing("the ranks' shards do not fit together:", problems))
    return merged


def _texts(state: dict, config_yaml: str) -> dict[str, str]:
    """The contents of the text files by name."""
    return {STATE_FILE: json.dumps(state, indent=1), CONFIG_FILE: config_yaml}


def _commit(lease: Lease, draft: Path, iteration: int, written: list, texts: dict) -> None:
    """Write text files and index, then rename: draft to folder, and the name of the latest last.

    written: what `_write_rank` returned on each rank.
    """
    root = lease.root
    # The text files and the index of everything.
    files = {name: write_file(draft / name, text.encode()) for name, text in texts.items()}
    tensors, rank_files = zip(*written)
    for rank, file in enumerate(rank_files):
        files[rank_file(rank)] = file
    index = Index(iteration, len(written), _merge(tensors), files)
    # Every rank's file must be visible here.
    for name, file in files.items():
        path = draft / name
        if not path.exists() or path.stat().st_size != file.bytes:
            raise CheckpointError(
                f"{path} is not there as it was written: is {root} the same folder on every node?"
            )
    write_file(draft / INDEX_FILE, index.to_json().encode())
    fsync_folder(draft)
    # The renames that make it visible.
    fresh = lease.staging_dir / LATEST_FILE
    write_file(fresh, f"{iteration}\n".encode())
    _move_in(lease, draft, iteration)
    fsync_folder(root)
    os.replace(fresh, root / LATEST_FILE)
    fsync_folder(root)


def _move_in(lease: Lease, draft: Path, iteration: int) -> None:
    """Rename the draft to `iter_N`; one that exists is kept as `iter_N.replaced-K`.

    If that one is the latest and the run is killed between the two renames, readers still find it:
    they open the one with the highest K when `iter_N` is missing.
    """
    root, folder = lease.root, lease.root / iteration_folder(iteration)
    if not folder.exists():
        os.rename(draft, folder)
        return
    replaced = replaced_folders(root, iteration)
    number = 1 + int(replaced[-1].name.rpartition("-")[2]) if replaced else 1
    # This path leads through the draft, which is gone when this run was replaced: then the rename
    # fails, and the successor's folder stays.
    here = draft / os.pardir / os.pardir
    name = folder.name
    aside = f"{name}.replaced-{number}"
    os.rename(here / name, here / aside)
    try:
        fsync_folder(root)
        os.rename(draft, folder)
    except OSError:
        with suppress(OSError):
            os.rename(here / aside, here / name)
        raise
    print(f"checkpoint: {folder} existed already and was moved to {aside}", flush=True)


def _prune(
    lease: Lease,
    latest: int,
    keep_last: int | None,
    keep_every: int | None,
    history: Collection[int] | None,
) -> None:
    """Remove checkpoints of `history` (None: all) before the `keep_last` newest up to iteration
    `latest`, unless their iteration is a multiple of `keep_every`. Those of another branch, and
    later ones, are left alone."""
    if keep_last is None and keep_every is None:
        return
    keep_last = keep_last or 1
    try:
        iterations = [number for number in list_iterations(lease.root) if number <= latest]
        if history is not None:
            iterations = [number for number in iterations if number in {*history, latest}]
        for iteration in iterations[:-keep_last]:
            if keep_every and iteration % keep_every == 0:
                continue
            # Renamed first: a kill in the middle of the deletion leaves nothing that looks like a
            # checkpoint.
            name = iteration_folder(iteration)
            os.rename(lease.root / name, lease.staging_dir / name)
        lease.clear()
    except OSError as error:
        older = f"checkpoints older than the last {keep_last}"
        print(f"checkpoint: could not remove {older}: {error_message(error)}", flush=True)
