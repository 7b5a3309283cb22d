"""Continue from a checkpoint, or start from its weights: the same one on all ranks."""

from collections.abc import Callable, Collection
from pathlib import Path

from megalite.checkpoint.config import CheckpointConfig
from megalite.checkpoint.folder import (
    CheckpointError,
    DamagedCheckpointError,
    checkpoint_folder,
    iteration_folder,
    iterations_to_try,
    list_iterations,
    listing,
    save_folder,
)
from megalite.config.rules.finding import flag_of
from megalite.config.run import RunConfig, with_values
from megalite.config.validate import check_checkpoint
from megalite.parallel.collectives import Group, gather_objects
from megalite.training.build import TrainingComponents
from megalite.training.state import Progress, load_pretrained, read_state

Read = Callable[[TrainingComponents, RunConfig, int], Progress]
"""Reads the checkpoint of an iteration on one rank; nothing communicates."""


def resume(
    parts: TrainingComponents, config: RunConfig, given: Collection[str] | None = None
) -> Progress:
    """Continue from --load, as `read_state`. Collective.

    Rank 0 says which iteration is read. With --load-fallback, when any rank finds it damaged, all
    go back to the one before, and a note says so. Raises on every rank, with the reason of those
    that failed: DamagedCheckpointError when none is whole, CheckpointError, also when what the run
    would go back to does not fit it.

    given: keys of the fields that the user named, which may differ from an earlier checkpoint's;
    None: all.
    """
    return _read_first_whole(parts, config, "load", read_state, given)


def start_from_pretrained(parts: TrainingComponents, config: RunConfig) -> Progress:
    """Start from the weights in --pretrained-checkpoint, as `load_pretrained`. Collective.

    Goes back to an earlier checkpoint, and raises, as `resume`.
    """
    return _read_first_whole(parts, config, "pretrained_checkpoint", load_pretrained, given=None)


def _read_first_whole(
    parts: TrainingComponents,
    config: RunConfig,
    key: str,
    read: Read,
    given: Collection[str] | None,
) -> Progress:
    """Read the latest checkpoint of the folder in the field `key`, or with --load-fallback the
    first that is whole."""
    world = parts.model.context.control
    attempts = _attempts(config.checkpoint, key) if world.rank == 0 else None
    damage, steps, caution = gather_objects(attempts, world)[0]
    notes = []
    for step in steps:
        if damage:
            folder = iteration_folder(step)
            notes.append(f"{damage}\n  going back to {folder} (--load-fallback){caution}")
        progress = None
        failure: CheckpointError | None = None
        try:
            progress = read(parts, config, step)
        except CheckpointError as error:
            failure = error
        damage = _agreed_damage(failure, world, notes)
        if not damage:
            if notes:
                _refuse_changes(parts, _reading(config, key, step), given, notes)
            parts.optimizer.weights_were_set()
            progress.notes[:0] = notes
            return progress
    raise DamagedCheckpointError("\n".join([*notes, damage, _remedy(config.checkpoint, key)]))


def _attempts(options: CheckpointConfig, key: str) -> tuple[str, list[int], str]:
    """What is wrong with the file that names the latest iteration; the iterations to read, in
    order: one, and with --load-fallback those that its run passed through before it; and what to
    say when that is not known, and they are all that are stored."""
    if key == "load" and options.ckpt_step is not None:
        return "", [options.ckpt_step], ""
    root = getattr(options, key)
    steps, damage, are_known = iterations_to_try(root)
    if not steps and not damage:
        return f"{root} holds no checkpoint", [], ""
    if not options.load_fallback:
        return damage, [] if damage else steps[:1], ""
    unknown = ", maybe of another branch: which ones the run passed through cannot be read"
    return damage, steps, "" if are_known else unknown


def _reading(config: RunConfig, key: str, step: int) -> RunConfig:
    """The configuration that names the checkpoint which is read."""
    values = {"load_fallback": False}
    if key == "load":
        values["ckpt_step"] = step
    else:
        values[key] = str(checkpoint_folder(getattr(config.checkpoint, key), step))
    return with_values(config, values)


def _refuse_changes(
    parts: TrainingComponents, config: RunConfig, given: Collection[str] | None, notes: list[str]
) -> None:
    """Raise CheckpointError on every rank when the checkpoint that was gone back to, which is the
    one of `config`, differs from the run in what may not change unasked. Before the start, only the
    latest was compared."""
    context = parts.model.context
    lines = []
    if context.rank == 0:
        for problem in check_checkpoint(config, context.world_size, given):
            lines.append(f"{problem.message}; fix: {problem.fix}")
    lines = gather_objects(lines, context.control)[0]
    if lines:
        heading = "the checkpoint to go back to does not fit this run:"
        raise CheckpointError("\n".join([*notes, listing(heading, lines)]))


def _agreed_damage(failure: CheckpointError | None, world: Group, notes: list[str]) -> str:
    """What damage the ranks found; "" when none did. Raises CheckpointError on every rank, with
    the notes, when one failed otherwise."""
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
        raise CheckpointError("\n".join([*notes, *lines])) from failure
    if len(lines) <= 1:
        return "".join(lines)
    return listing("the checkpoint cannot be read:", lines)


def _remedy(options: CheckpointConfig, key: str) -> str:
    """What helps when a checkpoint is damaged."""
    root = save_folder(getattr(options, key))
    steps = ", ".join(map(str, list_iterations(root))) or "none"
    flag = "--ckpt-step N"
    if key != "load" or root != Path(options.load):
        flag = f"{flag_of(key)} {root}/iter_N"
    others = f"{flag} loads another ({root} holds {steps})"
    if options.load_fallback:
        return f"no whole checkpoint is left; {others}"
    return f"--load-fallback goes back to the last whole one; {others}"
