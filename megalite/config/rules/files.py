"""Rules that read --load and look at the files and folders to write to. Imports no torch.

Rules that read datasets are in data.py, those that read tokenizers in tokenizer.py, those that
compare a run with its checkpoint in resume.py.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from megalite.checkpoint.folder import (
    CONFIG_FILE,
    CheckpointError,
    find_checkpoint,
    has_checkpoint,
    iteration_folder,
    iterations_to_try,
    latest_iteration,
    list_iterations,
    nearest_before,
    parse_text,
    save_folder,
    why_absent,
)
from megalite.checkpoint.text_files import read_state_file, read_text_file
from megalite.config.problem import ConfigError, Problem
from megalite.config.rules.data import DATA_RULES
from megalite.config.rules.disk import neighbours, same_place
from megalite.config.rules.finding import Finding, Rule, each, flag_of
from megalite.config.rules.tokenizer import TOKENIZER_FILE_RULES
from megalite.config.run import RunConfig, options, published_problems, to_flat, with_values
from megalite.config.yaml_file import config_of_checkpoint
from megalite.convert.published import read_folder
from megalite.data.config import TOKENIZER_FIELDS


def checkpoint_is_there(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """Something to load, unless the run may start from scratch: then --load is the folder it saves
    to."""
    c = config.checkpoint
    if c.load is None:
        return
    required = c.exit_on_missing_checkpoint and c.pretrained_checkpoint is None
    stored = list_iterations(c.load, replaced=True)
    unreadable = ""
    try:
        latest = latest_iteration(c.load)
    except CheckpointError as error:
        latest = -1
        unreadable = str(error)
    if not stored and latest is None:
        # A folder without checkpoints is right for the first run of a job.
        if same_place(c.load, c.save) and c.ckpt_step is None and not c.finetune:
            if required:
                yield Finding(
                    f"--load {c.load} holds no checkpoint yet, and --exit-on-missing-checkpoint is "
                    "given",
                    {"exit_on_missing_checkpoint": False},
                )
            return
        what = "holds no checkpoints" if os.path.isdir(c.load) else "is not a folder"
        beside = neighbours(c.load.rstrip("/"), "")
        yield Finding(
            f"--load {c.load} {what}",
            *each("load", [other for other in beside if list_iterations(other, replaced=True)]),
            {"load": None},
            "--load FOLDER that holds iter_* folders",
            also=("save", "ckpt_step"),
        )
    elif c.ckpt_step is not None and c.ckpt_step not in stored:
        steps = sorted(stored, key=lambda step: abs(step - c.ckpt_step))
        if latest in stored:
            steps.append(None)
        there = ", ".join(map(str, stored)) or "none"
        message = f"--ckpt-step {c.ckpt_step}: --load {c.load} holds iterations {there}"
        yield Finding(message, *each("ckpt_step", steps))
    elif c.ckpt_step is None and latest not in stored:
        earlier = nearest_before(c.load)
        if c.load_fallback and earlier is not None and save_folder(c.load) == Path(c.load):
            return
        why = unreadable or f"its latest checkpoint cannot be read: {why_absent(c.load, latest)}"
        fixes = _earlier_ones("load", c.load)
        if not fixes and stored:
            fixes = [{"ckpt_step": stored[-1]}]
            if c.load_fallback:  # which has no effect beside it
                fixes[0]["load_fallback"] = False
        fixes.append("--load another folder")
        yield Finding(f"--load {c.load}: {why}", *fixes, also=("ckpt_step", "load_fallback"))


def pretrained_checkpoint_is_there(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """Weights to start from, where --load does not hold a checkpoint to resume from."""
    key = "pretrained_checkpoint"
    folder = config.checkpoint.pretrained_checkpoint
    if folder is None or _resumes(config):
        return
    why = "holds no checkpoints"
    fixes = []
    try:
        _read_configuration(folder, None, config.checkpoint.load_fallback)
        return
    except CheckpointError as error:
        if has_checkpoint(folder):
            why = f"cannot be read: {error}"
            fixes = [] if config.checkpoint.load_fallback else _earlier_ones(key, folder)
    if not fixes:
        given = folder.rstrip("/")
        for other in neighbours(given, ""):
            if other != given and list_iterations(other, replaced=True):
                fixes.append({key: other})
    message = f"--pretrained-checkpoint {folder} {why}"
    yield Finding(message, *fixes, {key: None}, also=("load_fallback",))


def _earlier_ones(key: str, folder: str) -> list[dict[str, Any]]:
    """Fixes where the latest checkpoint of the folder in this field is damaged."""
    earlier = nearest_before(folder)
    if earlier is None:
        return []
    parent = save_folder(folder)
    if parent != Path(folder):  # it is one checkpoint
        return each(key, [str(parent / iteration_folder(earlier))])
    if key == "load":
        return [{"ckpt_step": earlier}, {"load_fallback": True}]
    return [{key: str(parent / iteration_folder(earlier))}, {"load_fallback": True}]


def checkpoint_to_load(config: RunConfig) -> tuple[Path | None, RunConfig | None]:
    """The folder of the checkpoint to load, and the configuration that it was made with. (None,
    None) where there is none or where, as loading reports, it cannot be read.

    With --load-fallback, one whose configuration, state or index cannot be read is passed over, as
    loading does.
    """
    c = config.checkpoint
    if c.load is not None:
        with suppress(CheckpointError, OSError):
            return _read_configuration(c.load, c.ckpt_step, c.load_fallback)
    return None, None


def _read_configuration(root: str, step: int | None, fallback: bool) -> tuple[Path, RunConfig]:
    """The checkpoint of an iteration in `root`, by default the latest, and the configuration that
    it was made with. fallback: or the first of those before it that can be read.

    Raises CheckpointError where there is none, or with what is wrong with the first.
    """
    if step is not None or not fallback:
        folder = find_checkpoint(root, step)
        return folder, read_stored_config(folder)
    failure = None
    for earlier in iterations_to_try(root)[0] or [None]:
        try:
            folder = find_checkpoint(root, earlier)
            read_state_file(folder)
            return folder, read_stored_config(folder)
        except CheckpointError as error:
            failure = failure or error
    raise failure


def _resumes(config: RunConfig) -> bool:
    """Whether the run takes a checkpoint in --load, maybe a damaged one."""
    return config.checkpoint.load is not None and has_checkpoint(config.checkpoint.load)


def weights_to_load(config: RunConfig) -> tuple[Path | None, RunConfig | None]:
    """`checkpoint_to_load`, or without one that of --pretrained-checkpoint."""
    return checkpoint_to_load(with_values(config, _source_of_weights(config)))


def _source_of_weights(config: RunConfig) -> dict[str, Any]:
    """--load and --ckpt-step of a run that resumes from what this one takes its weights from."""
    c = config.checkpoint
    if c.pretrained_checkpoint is None or _resumes(config):
        return {"load": c.load, "ckpt_step": c.ckpt_step}
    return {"load": c.pretrained_checkpoint, "ckpt_step": None}


def fields_of_checkpoint(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of model and tokenizer of the checkpoint that a run with these values loads, for
    --use-checkpoint-args.

    Empty without a folder to load from, which a rule reports. Raises ConfigError when there is no
    checkpoint in it, or its configuration cannot be read.
    """
    asked = {key: value for key, value in values.items() if options()[key].section == "checkpoint"}
    config = with_values(RunConfig(), asked)
    where, step = _source_of_weights(config).values()
    if where is None:
        return {}
    try:
        _, made_with = _read_configuration(where, step, config.checkpoint.load_fallback)
    except CheckpointError as error:
        why = f"{where} holds no checkpoint to take the model from"
        offers = []
        if has_checkpoint(where):
            why = f"the model cannot be taken from {where}: {error}"
            flag = "load" if _resumes(config) else "pretrained_checkpoint"
            if step is None and not config.checkpoint.load_fallback:
                for fix in _earlier_ones(flag, where):
                    offers += [options()[key].setting(value) for key, value in fix.items()]
        offers.append("give the model's flags, and leave out --use-checkpoint-args")
        problem = Problem(
            f"--use-checkpoint-args: {why}", ", or ".join(offers), ("use_checkpoint_args", "load")
        )
        raise ConfigError([problem]) from None
    found = {}
    for key, value in to_flat(made_with).items():
        of_model = options()[key].section == "model" and options()[key].field.changes_numbers
        if key in TOKENIZER_FIELDS or key == "bert_pair" or (of_model and key != "architecture"):
            found[key] = value
    return found


def read_stored_config(folder: Path) -> RunConfig:
    """The configuration that a checkpoint was made with. Raises CheckpointError, with the file and
    what is wrong."""
    path = folder / CONFIG_FILE
    text = parse_text(read_text_file(folder, CONFIG_FILE), path)
    try:
        return config_of_checkpoint(text, str(path))
    except ConfigError as error:
        raise CheckpointError("; ".join(p.message for p in error.problems)) from None
    except ValueError as error:  # a number of more digits than Python reads
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def published_weights_are_whole(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """The folder of --load-hf holds every tensor of its model, unless the run resumes a
    checkpoint."""
    folder = config.checkpoint.load_hf
    if folder is None or _resumes(config):
        return
    try:
        read_folder(folder)
    except CheckpointError as error:
        for problem in published_problems(error):
            yield Finding(problem.message, problem.fix)


def checkpoints_stay_apart(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """A run does not start from scratch in a folder that holds another run's checkpoints."""
    c = config.checkpoint
    if c.save is None or config.training.dry_run:
        return
    stored = list_iterations(c.save, replaced=True)
    loaded = None if c.load is None else str(save_folder(c.load))
    if not stored or (same_place(c.save, loaded) and not c.finetune):
        return
    # A fine-tuning that was stopped resumes as any run: from its own folder, without --finetune.
    resume = {"load": c.save}
    if c.finetune:
        resume["finetune"] = False
    yield Finding(
        f"--save {c.save} holds checkpoints of another run, the last of iteration {stored[-1]}, "
        "which this run does not continue",
        resume,
        {"save": c.save.rstrip("/") + "-new"},
        also=("load",),
    )


def results_can_be_written(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """--save and --trace are, or may become, folders to write in; --metrics-file a file."""
    t = config.training
    paths = {"save": config.checkpoint.save, "trace": t.trace, "metrics_file": t.metrics_file}
    for key, path in paths.items():
        if path is None:
            continue
        whole = Path(path).absolute()
        nearest = next(p for p in (whole, *whole.parents) if p.exists())
        given = f"{flag_of(key)} {path}"
        other = {key: path.rstrip("/") + "-new"}
        if key != "metrics_file" and whole.is_file():
            yield Finding(f"{given} is a file, not a folder", other)
        elif key == "metrics_file" and whole.is_dir():
            yield Finding(f"{given} is a folder, not a file", other)
        elif not os.access(nearest, os.W_OK) or (nearest != whole and not nearest.is_dir()):
            here = {key: os.path.basename(path)}
            yield Finding(f"{given}: nothing can be written in {nearest}", here)


def traces_stay_apart(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """No trace is overwritten. A run that resumes leaves the trace of its beginning alone."""
    trace = config.training.trace
    if trace is None or config.training.dry_run or checkpoint_to_load(config)[0] is not None:
        return
    if sorted(Path(trace).glob("trace*.json")):
        other = trace.rstrip("/") + "-new"
        yield Finding(f"--trace {trace} holds the trace of an earlier run", {"trace": other})


FILE_RULES: tuple[Rule, ...] = (
    *DATA_RULES,
    *TOKENIZER_FILE_RULES,
    checkpoint_is_there,
    pretrained_checkpoint_is_there,
    published_weights_are_whole,
    checkpoints_stay_apart,
    results_can_be_written,
    traces_stay_apart,
)
