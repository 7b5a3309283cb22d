"""Continue from a checkpoint, the same one on all ranks."""

from pathlib import Path

from megalite.checkpoint.config import CheckpointConfig
from megalite.checkpoint.folder import (
    CheckpointError,
    DamagedCheckpointError,
    iteration_folder,
    iterations_before,
    latest_iteration,
    list_iterations,
    listing,
)
from megalite.config.run import RunConfig
from megalite.parallel.collectives import Group, gather_objects
from megalite.training.build import TrainingComponents
from megalite.training.state import Progress, read_state


def resume(parts: TrainingComponents, config: RunConfig) -> Progress:
    """Continue from --load, as `read_state`. Collective.

    Rank 0 says which iteration is read. With --load-fallback, when any rank finds it damaged, all
    go back to the one before, and a note says so. Raises on every rank, with the reason of those
    that failed: DamagedCheckpointError when none is whole, CheckpointError.
    """
    options = config.checkpoint
    world = parts.model.context.control
    attempts = _attempts(options) if world.rank == 0 else None
    damage, steps, caution = gather_objects(attempts, world)[0]
    notes = []
    for step in steps:
        if damage:
            folder = iteration_folder(step)
            notes.append(f"{damage}\n  going back to {folder} (--load-fallback){caution}")
        progress = None
        failure: CheckpointError | None = None
        try:
            progress = read_state(parts, config, step)
        except CheckpointError as error:
            failure = error
        damage = _agreed_damage(failure, world)
        if not damage:
            parts.optimizer.weights_were_set()
            progress.notes[:0] = notes
            return progress
    raise DamagedCheckpointError("\n".join([*notes, damage, _remedy(options)]))


def _attempts(options: CheckpointConfig) -> tuple[str, list[int], str]:
    """What is wrong with the file that names the latest iteration; the iterations to read, in
    order: one, and with --load-fallback those that its run passed through before it; and what to
    say when that is not known, and they are all that are stored."""
    if options.ckpt_step is not None:
        return "", [options.ckpt_step], ""
    unknown = ", maybe of another branch: which ones the run passed through cannot be read"
    try:
        latest = latest_iteration(options.load)
    except DamagedCheckpointError as error:
        stored = list_iterations(options.load)[::-1]
        return str(error), stored if options.load_fallback else [], unknown
    if latest is None:
        return f"{options.load} holds no checkpoint", [], ""
    if not options.load_fallback:
        return "", [latest], ""
    earlier, are_known = iterations_before(options.load, latest)
    return "", [latest, *earlier], "" if are_known else unknown


def _agreed_damage(failure: CheckpointError | None, world: Group) -> str:
    """What damage the ranks found; "" when none did. Raises CheckpointError on every rank when
    one failed otherwise."""
    own = failure and (isinstance(failure, DamagedCheckpointError), str(failure))
    found: dict[tuple[bool, str], list[int]] = {}
    for rank, outcome in enumerate(gather_objects(own, world)):
        if outcome:
            found.setdefault(outcome, []).append(rank)
    lines = []
    for (_, message), ranks in found.items():
        by = "" if len(ranks) == world.size else f"rank {ranks[0]}: "
        lines.append(by + message)
    if not all(is_damage for is_damage, _ in found):
        raise CheckpointError("\n".join(lines)) from failure
    if len(lines) <= 1:
        return "".join(lines)
    return listing("the checkpoint cannot be read:", lines)


def _remedy(options: CheckpointConfig) -> str:
    """What helps when a checkpoint is damaged."""
    steps = ", ".join(map(str, list_iterations(options.load))) or "none"
    others = f"--ckpt-step N loads another ({Path(options.load)} holds {steps})"
    if options.load_fallback:
        return f"no whole checkpoint is left; {others}"
    return f"--load-fallback goes back to the last whole one; {others}"
