"""Rules that look at files: checkpoints and places to write; those of the data are in data.py. Imports no torch."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

from megalite.checkpoint.folder import (
    STATE_FILE,
    CheckpointError,
    checkpoint_folder,
    latest_iteration,
)
from megalite.config.rules.data import DATA_RULES
from megalite.config.rules.disk import neighbours, same_place, stored_iterations
from megalite.config.rules.finding import PATHS, Finding, Rule, global_batch, iterations
from megalite.config.rules.tokenizer import TOKENIZER_FILE_RULES
from megalite.config.run import RunConfig, from_flat


def checkpoint_is_there(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """Something to load, unless the run may start from scratch: then --load is the folder it saves to."""
    c = config.checkpoint
    if c.load is None:
        return
    stored = stored_iterations(c.load)
    try:
        latest, said = latest_iteration(c.load), ""
    except CheckpointError as error:
        latest, said = -1, str(error)
    if not stored and latest is None:
        if same_place(c.load, c.save) and c.ckpt_step is None and not c.finetune:
            return
        what = "holds no checkpoints" if os.path.isdir(c.load) else "is no folder"
        others = [
            {"load": path} for path in neighbours(c.load.rstrip("/"), "") if stored_iterations(path)
        ]
        offers = (*others, {"load": None}, "--load FOLDER that holds iter_* folders")
        yield Finding(f"--load {c.load} {what}", ("load", "save", "ckpt_step", "finetune"), offers)
    elif c.ckpt_step is not None and c.ckpt_step not in stored:
        steps = sorted(stored, key=lambda step: abs(step - c.ckpt_step))
        yield Finding(
            f"--ckpt-step {c.ckpt_step}: --load {c.load} holds iterations {', '.join(map(str, stored))}",
            ("ckpt_step", "load"),
            (
                *({"ckpt_step": step} for step in steps),
                *([{"ckpt_step": None}] if latest in stored else []),
            ),
        )
    elif c.ckpt_step is None and latest not in stored:
        yield Finding(
            f"--load {c.load}: " + (said or f"the latest iteration, {latest}, is not there"),
            ("load", "ckpt_step"),
            ({"ckpt_step": stored[-1]},) if stored else ("--load another folder",),
        )


SAME_MODEL = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "query_groups",
    "head_size",
    "ffn",
    "swiglu",
    "gelu",
    "vocab_size",
    "position_embedding_type",
    "rotary_base",
    "normalization",
    "norm_epsilon",
    "norm_placement",
    "disable_bias_linear",
    "untie_embeddings_and_output_weights",
)
"""What makes a model the same model: fields and properties of ModelConfig, the latter named by their fields below."""
FIELD_OF = {
    "query_groups": "num_query_groups",
    "head_size": "kv_channels",
    "ffn": "ffn_hidden_size",
}


def checkpoint_fits_model(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """The checkpoint holds this model, not one with other layers, widths, norms or positions."""
    c = config.checkpoint
    if c.load is None:
        return
    try:
        iteration = c.ckpt_step if c.ckpt_step is not None else latest_iteration(c.load)
        folder = checkpoint_folder(c.load, iteration) if iteration is not None else None
        made_with = read_config(folder) if folder is not None else None
    except (CheckpointError, OSError, ValueError):
        return  # loading says what is wrong with it
    if made_with is None:
        return
    if made_with.is_bert != config.is_bert:
        there = made_with.model.architecture
        yield Finding(
            f"the model in {folder} is a {there.upper()}, this run's is a {config.model.architecture.upper()}",
            ("architecture", "load"),
            (f"pretrain_{there}.py goes on with it", "--load another folder"),
        )
        return
    if made_with.is_bert and made_with.pair_head != config.pair_head:
        there, here = made_with.bert.bert_pair, config.bert.bert_pair
        heads = "has no pair head" if there == "none" else "has a pair head"
        yield Finding(
            f"the model in {folder} {heads} (--bert-pair {there}), this run has --bert-pair {here}",
            ("bert_pair", "load"),
            ({"bert_pair": there},),
        )
    stored = made_with.model
    names = list(SAME_MODEL)
    if stored.position_embedding_type == "learned_absolute":
        names.append("positions")
    for name in names:
        there, here = getattr(stored, name), getattr(config.model, name)
        if there != here and not (name == "vocab_size" and here is None):
            key = FIELD_OF.get(name, "max_position_embeddings" if name == "positions" else name)
            yield Finding(
                f"the model in {folder} has {key} {there}, this run has {here}",
                (key, "load"),
                ({key: there},),
            )


def data_is_the_checkpoints(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """The training data and its order are those that the checkpoint was made with, or the change is allowed."""
    from megalite.data.build import data_state
    from megalite.data.indexed import DatasetError
    from megalite.data.sources import DataState

    c = config.checkpoint
    if c.load is None or c.finetune or c.allow_data_change:
        return
    try:
        iteration = c.ckpt_step if c.ckpt_step is not None else latest_iteration(c.load)
        folder = checkpoint_folder(c.load, iteration) if iteration is not None else None
        stored = (
            json.loads((folder / STATE_FILE).read_text()).get("data")
            if folder is not None
            else None
        )
        if stored is None or read_config(folder).is_bert != config.is_bert:
            return  # nothing to compare with, or another kind of model, which another rule tells
        samples = iterations(config, world_size) * global_batch(config, world_size)
        now = data_state(config.data, config.model, config.training.seed, samples, config.bert)
        differences = DataState.from_json(stored).differences(now)
    except (CheckpointError, DatasetError, OSError, ValueError, KeyError, TypeError):
        return  # other rules, or loading, say what is wrong
    if differences:
        yield Finding(
            f"the training data is not what {folder} was made with: {'; '.join(differences)}",
            ("allow_data_change", "load", "split", *PATHS),
            ({"allow_data_change": True}, "give the data and the flags that differ as in that run"),
        )


def read_config(folder: Path) -> RunConfig:
    """The configuration that a checkpoint was made with. Raises OSError or ValueError when it cannot be read."""
    import yaml

    try:
        return from_flat(yaml.safe_load((folder / "config.yaml").read_text()))
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def checkpoints_stay_apart(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """A run does not start anew in a folder that holds another run's checkpoints."""
    c = config.checkpoint
    if c.save is None or config.training.dry_run or not (stored := stored_iterations(c.save)):
        return
    if c.finetune or not same_place(c.save, c.load):
        # A fine-tuning that was stopped goes on as any run: from its own folder, without --finetune.
        resume = [{"load": c.save, "finetune": False}] if c.finetune else [{"load": c.save}]
        yield Finding(
            f"--save {c.save} holds checkpoints of another run, the last of iteration {stored[-1]}, "
            "which this run does not go on from",
            ("save", "load", "finetune"),
            (*resume, {"save": c.save.rstrip("/") + "-new"}),
        )


def results_can_be_written(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """--save is, or may become, a folder to write in; --metrics-file a file."""
    for key, path in (
        ("save", config.checkpoint.save),
        ("metrics_file", config.training.metrics_file),
    ):
        if path is None:
            continue
        wants, other = ("folder", os.path.isfile) if key == "save" else ("file", os.path.isdir)
        flag = "--" + key.replace("_", "-")
        place = next(
            p for p in (Path(path).absolute(), *Path(path).absolute().parents) if p.exists()
        )
        if other(path):
            kind = "file" if wants == "folder" else "folder"
            yield Finding(
                f"{flag} {path} is a {kind}, not a {wants}",
                (key,),
                ({key: path.rstrip("/") + "-new"},),
            )
        elif not os.access(place, os.W_OK) or (
            place != Path(path).absolute() and not place.is_dir()
        ):
            yield Finding(
                f"{flag} {path}: nothing can be written in {place}",
                (key,),
                ({key: os.path.basename(path)},),
            )


FILE_RULES: tuple[Rule, ...] = (
    *DATA_RULES,
    *TOKENIZER_FILE_RULES,
    checkpoint_is_there,
    checkpoint_fits_model,
    data_is_the_checkpoints,
    checkpoints_stay_apart,
    results_can_be_written,
)
