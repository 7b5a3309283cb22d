"""Rules that read --load and look at the files and folders to write to. Imports no torch.

Rules that read datasets are in data.py, those that read tokenizers in tokenizer.py.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megalite.checkpoint.folder import (
    CONFIG_FILE,
    STATE_FILE,
    CheckpointError,
    checkpoint_folder,
    latest_iteration,
    list_iterations,
    parse_text,
    read_file,
    read_json,
    save_folder,
)
from megalite.config.problem import ConfigError, Problem
from megalite.config.rules.data import DATA_RULES
from megalite.config.rules.disk import neighbours, same_place
from megalite.config.rules.finding import Finding, Rule, each, flag_of, global_batch, iterations
from megalite.config.rules.tokenizer import TOKENIZER_FILE_RULES
from megalite.config.run import (
    RunConfig,
    keys_where,
    options,
    published_problems,
    to_flat,
    with_values,
)
from megalite.config.yaml_file import config_of_checkpoint
from megalite.convert.published import find_tensors, read_published, stored_tensors
from megalite.data.build import data_state
from megalite.data.config import TOKENIZER_FIELDS
from megalite.data.indexed import DatasetError
from megalite.data.sources import DataState


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
        there = ", ".join(map(str, stored))
        message = f"--ckpt-step {c.ckpt_step}: --load {c.load} holds iterations {there}"
        yield Finding(message, *each("ckpt_step", steps))
    elif c.ckpt_step is None and latest not in stored and not (c.load_fallback and stored):
        why = unreadable or f"the latest iteration, {latest}, is not there"
        fix = {"ckpt_step": stored[-1]} if stored else "--load another folder"
        yield Finding(f"--load {c.load}: {why}", fix, also=("ckpt_step",))


def pretrained_checkpoint_is_there(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """Weights to start from, where --load does not hold a checkpoint to resume from."""
    folder = config.checkpoint.pretrained_checkpoint
    if folder is None or checkpoint_to_load(config)[0] is not None:
        return
    if _weights_to_load(config)[0] is None:
        beside = neighbours(folder.rstrip("/"), "")
        there = [other for other in beside if list_iterations(other, replaced=True)]
        yield Finding(
            f"--pretrained-checkpoint {folder} holds no checkpoints",
            *each("pretrained_checkpoint", there),
            {"pretrained_checkpoint": None},
        )


def checkpoint_fits_model(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """The checkpoint holds this model, not one with other layers, widths, norms or positions."""
    folder, made_with = _weights_to_load(config)
    if made_with is None:
        return
    # The architecture.
    there = made_with.model.architecture
    here = config.model.architecture
    if there != here:
        yield Finding(
            f"the model in {folder} is a {there.upper()}, this run's is a {here.upper()}",
            f"pretrain_{there}.py resumes it",
            "--load another folder",
        )
        return
    # The heads.
    if made_with.pair_head != config.pair_head:
        there = made_with.bert.bert_pair
        heads = "has no pair head" if there == "none" else "has a pair head"
        yield Finding(
            f"the model in {folder} {heads} (--bert-pair {there}), this run has --bert-pair "
            f"{config.bert.bert_pair}",
            {"bert_pair": there},
        )
    # The shape.
    stored = made_with.model.filled()
    wanted = config.model.filled()
    keys = set(keys_where(lambda field: field.defines_model))
    if stored.position_embedding_type != "learned_absolute":
        keys.discard("max_position_embeddings")  # of RoPE it is only a limit
    if config.model.vocab_size is None:
        keys.discard("vocab_size")
    hidden = set(keys_where(lambda field: field.keeps_shapes))
    if config.checkpoint.allow_model_change:
        keys -= hidden
    for key in options():
        there = getattr(stored, key, None)
        here = getattr(wanted, key, None)
        if key in keys and there != here:
            message = f"the model in {folder} has {key} {there}, this run has {here}"
            fixes = [{key: there}]
            if key in hidden:
                fixes.append({"allow_model_change": True})
            yield Finding(message, *fixes, also=(key,))


def data_is_the_checkpoints(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """The training data and its order are those that the checkpoint was made with, or the change is
    allowed."""
    if config.checkpoint.finetune or config.checkpoint.allow_data_change:
        return
    folder, made_with = checkpoint_to_load(config)
    if made_with is None or made_with.model.architecture != config.model.architecture:
        return  # another rule reports another model
    try:
        stored = read_json(folder / STATE_FILE).get("data")
        if stored is None:
            return
        samples = iterations(config, world_size) * global_batch(config, world_size)
        seed = config.training.seed
        now = data_state(config.data, config.model, seed, num_samples=samples, bert=config.bert)
        differences = DataState.from_json(stored).differences(now)
    except (CheckpointError, DatasetError, OSError, ValueError, KeyError, TypeError):
        return  # other rules, or loading, say what is wrong
    if differences:
        yield Finding(
            f"the training data is not what {folder} was made with: {'; '.join(differences)}",
            {"allow_data_change": True},
            "give the data and the flags that differ as in that run",
            also=("split",),
        )


def checkpoint_to_load(config: RunConfig) -> tuple[Path | None, RunConfig | None]:
    """The folder of the checkpoint to load, and the configuration that it was made with. (None,
    None) where there is none or where, as loading reports, it cannot be read."""
    c = config.checkpoint
    try:
        folder = None if c.load is None else folder_to_load(c.load, c.ckpt_step)
        if folder is not None:
            return folder, read_stored_config(folder)
    except (CheckpointError, OSError, ValueError):
        pass
    return None, None


def _weights_to_load(config: RunConfig) -> tuple[Path | None, RunConfig | None]:
    """`checkpoint_to_load`, or without one that of --pretrained-checkpoint."""
    pretrained = config.checkpoint.pretrained_checkpoint
    folder, made_with = checkpoint_to_load(config)
    if folder is None and pretrained is not None:
        other = with_values(config, {"load": pretrained, "ckpt_step": None})
        return checkpoint_to_load(other)
    return folder, made_with


def fields_of_checkpoint(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of model and tokenizer of the checkpoint that a run with these values loads, for
    --use-checkpoint-args.

    Empty without a folder to load from, which a rule reports. Raises ConfigError when there is no
    checkpoint in it.
    """
    asked = {key: value for key, value in values.items() if options()[key].section == "checkpoint"}
    config = with_values(RunConfig(), asked)
    _, made_with = _weights_to_load(config)
    where = config.checkpoint.load or config.checkpoint.pretrained_checkpoint
    if where is None:
        return {}
    if made_with is None:
        message = f"--use-checkpoint-args: {where} holds no checkpoint to take the model from"
        fix = "give the model's flags, and leave out --use-checkpoint-args"
        raise ConfigError([Problem(message, fix, ("use_checkpoint_args", "load"))])
    found = {}
    for key, value in to_flat(made_with).items():
        of_model = options()[key].section == "model" and options()[key].field.changes_numbers
        if key in TOKENIZER_FIELDS or key == "bert_pair" or (of_model and key != "architecture"):
            found[key] = value
    return found


def folder_to_load(load: str, step: int | None) -> Path | None:
    """The folder of the checkpoint of an iteration, or, for None, of the latest; None when there is
    none. Raises CheckpointError."""
    iteration = latest_iteration(load) if step is None else step
    return None if iteration is None else checkpoint_folder(load, iteration)


def read_stored_config(folder: Path) -> RunConfig:
    """The configuration that a checkpoint was made with. Raises CheckpointError or ValueError."""
    path = folder / CONFIG_FILE
    return config_of_checkpoint(parse_text(read_file(path), path))


def published_weights_are_whole(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """The folder of --load-hf holds every tensor of its model, unless the run resumes a
    checkpoint."""
    folder = config.checkpoint.load_hf
    if folder is None or checkpoint_to_load(config)[0] is not None:
        return
    try:
        find_tensors(read_published(folder), stored_tensors(Path(folder)))
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
    checkpoint_fits_model,
    data_is_the_checkpoints,
    published_weights_are_whole,
    checkpoints_stay_apart,
    results_can_be_written,
    traces_stay_apart,
)
