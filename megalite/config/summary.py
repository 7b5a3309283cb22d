"""What a run is, in some twenty lines. Imports no torch."""

import json
import os
import shutil
from itertools import groupby
from pathlib import Path
from typing import Any

from megalite.checkpoint.folder import CONFIG_FILE
from megalite.config.estimate import (
    RankEstimate,
    estimate_ranks,
    flops_by_action,
    microbatches,
    model_parameters,
    work_of_ranks,
)
from megalite.config.help import wrapped
from megalite.config.rules.deepspeed import deepspeed_settings
from megalite.config.rules.finding import data_parallel_size
from megalite.config.rules.tokenizer import tokenizer_or_none
from megalite.config.run import RunConfig, options, with_values
from megalite.config.validate import chosen, fill_in
from megalite.config.yaml_file import to_yaml
from megalite.convert.tokenizer_files import kept_paths, tokenizer_of
from megalite.deepspeed import settings
from megalite.models.presets import preset
from megalite.parallel.config import OF_DATA_RANKS
from megalite.pipeline.schedules import pipeline_of, training_orders
from megalite.pipeline.simulate import simulate
from megalite.system.errors import explain_os_error, scaled

LABEL_COLUMNS = 16
"""Columns before the text of a line."""
MOST_WORDS = 8
"""Words of a list that is shown whole."""
SHOWN_WORDS = 4
"""Words that are shown of a longer list."""
MOST_CONFIGS = 99
"""Configurations kept in one folder."""


def summary_lines(config: RunConfig, world_size: int) -> list[str]:
    """What a resolved configuration amounts to on this many ranks: model, layout, memory, batch,
    length, learning rate, data, checkpoints, and the flags that make it."""
    m = config.model
    # The ranks of the pipeline. The one with the most bytes limits the size of the model.
    estimates = estimate_ranks(config, world_size)
    most = max(estimates, key=lambda rank: rank.total_bytes)
    fullest = "a rank of stage " + " and ".join(map(str, most.stages))
    if len(most.stages) > 1:
        fullest = fullest.replace("stage", "stages", 1)
    # The batch and the length.
    batch = config.data.global_batch_size
    count = microbatches(config, world_size)
    iterations = config.training.train_iters
    sizes = config.batch_sizes
    samples = sizes.consumed_after(iterations)
    ramp = full = ""
    if sizes.start is not None:
        full = "; both at the full batch"
        ramp = f", from {sizes.start} in steps of {sizes.increment} over {sizes.samples} sequences"
    # The command line that makes the configuration.
    flags = [_setting(key, value) for key, value in chosen(config, world_size).items()]
    rows = {
        "model": _model(config),
        "ranks": _layout(config, world_size),
        "parameters": (
            f"{_short(model_parameters(config))}; {_short(most.parameters)} on {fullest}"
        ),
        "layers": _layers(config, estimates),
        "memory": (
            f"roughly {_short(most.total_bytes)}B on {fullest}, the fullest: "
            f"{_short(most.state_bytes)}B of weights and optimizer, "
            f"{_short(most.activation_bytes)}B of activations"
        ),
        "global batch": (
            f"{batch} sequences of {m.seq_length} tokens{ramp}, "
            f"{config.data.micro_batch_size} a microbatch"
        ),
        "microbatches": (
            f"{count} for each data-parallel rank; pipeline bubble {_bubble(config, count)}{full}"
        ),
        "length": (
            f"{iterations} iterations, {samples} sequences, {_short(samples * m.seq_length)} tokens"
        ),
        "learning rate": _learning_rate(config),
        **_deepspeed(config, world_size),
        "data": _data(config),
        "checkpoints": _checkpoints(config),
        "flags": " ".join(flags) or "defaults",
    }
    lines = []
    for label, text in rows.items():
        lines += wrapped(text, f"  {label}".ljust(LABEL_COLUMNS))
    return lines


def given(config: RunConfig) -> RunConfig:
    """A resolved configuration as a file for --config: where samples or tokens set the length,
    without the iterations and the end of the decay that follow, so that flags may change it."""
    t = config.training
    if t.train_samples is None and t.train_tokens is None:
        return config
    shorter = config
    for key in ("train_iters", "lr_decay_iters"):
        without = with_values(shorter, {key: None})
        if fill_in(without, world_size=1) == config:  # its global batch size is filled in
            shorter = without
    return shorter


def keep_config(config: RunConfig, folder: str) -> str:
    """Write the whole configuration to config.yaml in a folder, and a copy of DeepSpeed's file, if
    it is used, to ds.json, or, where other ones are there already, to config-2.yaml and ds-2.json,
    and so on. Returns a line for the log that names the files, or says why they could not be
    written, which ends no training."""
    texts = {CONFIG_FILE: to_yaml(given(config)).encode()}
    try:
        if config.deepspeed.deepspeed:
            texts["ds.json"] = Path(config.deepspeed.deepspeed_config).read_bytes()
        for number in range(1, MOST_CONFIGS + 1):
            paths = {_numbered(Path(folder) / name, number): text for name, text in texts.items()}
            if all(not path.exists() or _holds(path, text) for path, text in paths.items()):
                for path, text in paths.items():
                    if not path.exists():
                        with open(path, "xb") as file:
                            file.write(text)
                copied = ", a copy of DeepSpeed's file in ".join(map(str, paths))
                return f"the whole configuration is in {copied}"
    except OSError as error:
        return f"the configuration cannot be written: {explain_os_error(error)}"
    return f"{folder} holds {MOST_CONFIGS} other configurations: this one is not written"


def keep_published(config: RunConfig) -> str:
    """Copy to --save what else is needed to write a folder like that of --load-hf: its config.json,
    its generation_config.json, and the files of its tokenizer if the run uses them. Returns a line
    for the log that names them, or says why they could not be copied, which ends no training."""
    source = Path(config.checkpoint.load_hf)
    save = Path(config.checkpoint.save)
    tokenizer = tokenizer_of(source)
    used = {key: getattr(config.data, key) for key in tokenizer}
    paths = kept_paths(source, tokenizer=tokenizer != {} and used == tokenizer)
    try:
        for path in paths:
            draft = save / f".{path.name}.draft"
            shutil.copyfile(path, draft)
            os.replace(draft, save / path.name)
    except OSError as error:
        return f"the files of {source} cannot be kept: {explain_os_error(error)}"
    names = ", ".join(path.name for path in paths)
    return f"kept in {save}: {names} of {source}"


def _holds(path: Path, text: bytes) -> bool:
    """Whether it is a file of this content. A pipe is not opened, which might wait for ever."""
    return path.is_file() and path.read_bytes() == text


def _numbered(path: Path, number: int) -> Path:
    """config.yaml, config-2.yaml, ..."""
    return path if number == 1 else path.with_stem(f"{path.stem}-{number}")


def _model(config: RunConfig) -> str:
    """What kind of model it is, its precision and its dropout."""
    m = config.model
    vocabulary = f"vocabulary {m.vocab_size}"
    if "vocab_size" in preset(m.preset):
        # A preset's vocabulary may be meant for another tokenizer.
        tokenizer = tokenizer_or_none(config)
        if tokenizer is not None and tokenizer.vocab_size < m.vocab_size:
            vocabulary += f" (the tokenizer has {tokenizer.vocab_size})"
    text = (
        f"{m.architecture.upper()}, {m.num_layers} layers, hidden {m.hidden_size}, "
        f"{m.num_attention_heads} heads, {vocabulary}, {config.optimizer.precision}, "
        f"dropout {m.hidden_dropout:g}, {m.attention_dropout:g} in attention"
    )
    if config.head_cost.dense:
        text += f", {m.norm_placement}-norm, pairs {config.bert.bert_pair}, "
        text += f"{config.bert.mask_prob:.0%} of the tokens masked"
    return text


def _layout(config: RunConfig, world_size: int) -> str:
    """How the ranks are divided, and what that leaves without an effect."""
    p = config.parallel
    tensor = p.tensor_model_parallel_size
    stages = p.pipeline_model_parallel_size
    layout = f"{world_size} = tensor {tensor} x pipeline {stages} "
    data = data_parallel_size(config, world_size)
    layout += f"x data {data}"
    if p.sequence_parallel:
        layout += ", sequence parallel"
    idle = [key for key in OF_DATA_RANKS if getattr(p, key) != options()[key].default]
    if data == 1 and idle:  # no error: scripts for many ranks are tried on few
        shown = " ".join(_setting(key, getattr(p, key)) for key in idle)
        layout += f"; with one data rank, no effect of {shown}"
    return layout


def _layers(config: RunConfig, estimates: list[RankEstimate]) -> str:
    """The layers of each stage by rank, the schedule, and what it keeps."""
    of_ranks = []
    for estimate in estimates:
        of_ranks.append(" + ".join(str(len(layers)) for layers in estimate.stages.values()))
    schedule = config.parallel.pipeline_schedule
    chunks = len(estimates[0].stages)
    if chunks == 1:
        text = f"{' + '.join(of_ranks)} ({schedule})"
    else:
        # Ranks that follow each other and hold the same are named together.
        words = []
        first = 0
        for layers, group in groupby(of_ranks):
            last = first + len(list(group)) - 1
            ranks = f"rank {first}" if first == last else f"ranks {first} to {last}"
            words.append(f"{ranks}: {layers}")
            first = last + 1
        text = f"{', '.join(words)} ({schedule}, {chunks} stages a rank)"
    if len(estimates) > 1:
        # A microbatch whose activations are kept of one of a rank's stages counts in part.
        held = max(rank.in_flight / len(rank.stages) for rank in estimates)
        text += f", at most {held:g} microbatches in flight"
        work = work_of_ranks(config)
        relative = max(work) * len(work) / sum(work)
        text += f", the busiest rank has {relative:.2f} times the mean work"
    if config.recompute.granularity != "none":
        text += f", recompute {config.recompute.granularity}"
    return text


def _bubble(config: RunConfig, microbatches: int) -> str:
    """The time that ranks of a pipeline do not compute, by simulation: where all stages take the
    same time, and with the FLOPs of each."""
    pipeline = pipeline_of(config.parallel)
    orders = training_orders(config.parallel, microbatches)
    text = f"{simulate(orders, pipeline).bubble:.1%} of the ideal time"
    if pipeline.ranks > 1:
        flops = flops_by_action(config)
        by_work = simulate(orders, pipeline, lambda action: flops[action.stage][action.kind])
        by_work = f"{by_work.bubble:.1%}"
        if not text.startswith(by_work):
            text += f", {by_work} by the work of each stage"
    return text


def _learning_rate(config: RunConfig) -> str:
    o = config.optimizer
    text = f"{o.lr:g}"
    plan = config.schedule()
    unit = "sequence" if o.counts_samples else "iteration"
    if plan.warmup:
        text += f" after {plan.warmup} {unit}s of warm-up"
    if o.lr_decay_style == "constant":
        text += ", constant"
    elif o.lr_decay_style == "inverse-square-root":
        text += f", inverse-square-root, at least {o.lowest_lr:g}"
    else:
        text += f", {o.lr_decay_style} to {o.lowest_lr:g} at {unit} {plan.decay}"
    text += f" ({o.optimizer})"
    if o.decoupled_lr is not None:
        text += f"; {o.decoupled_lr:g} for the rows of the vocabulary (--decoupled-lr)"
        if o.lr_decay_style != "constant":
            text += f", at least {o.decoupled.lowest_lr:g}"
    return text


def _deepspeed(config: RunConfig, world_size: int) -> dict[str, str]:
    """What DeepSpeed does, and what it is given, if it is used."""
    path = config.deepspeed.deepspeed_config
    if path is None:
        return {}
    given = deepspeed_settings(config, world_size)
    text = f"ZeRO stage {settings.stage_of(given)}, as {path} says"
    if settings.offloads(given):
        text += "; optimizer on the CPU"
    if settings.offloads(given, "offload_param"):
        text += "; weights on the CPU"
    return {"DeepSpeed": text, "its settings": json.dumps(given)}


def _setting(key: str, value: Any) -> str:
    """A field and its value as a flag; of a long list, such as many datasets, the beginning."""
    if not isinstance(value, tuple) or len(value) <= MOST_WORDS:
        return options()[key].setting(value)
    beginning = options()[key].setting(value[:SHOWN_WORDS])
    return f"{beginning} ... ({len(value)} words)"


def _data(config: RunConfig) -> str:
    """Where the tokens come from."""
    d = config.data
    if d.mock_data:
        return "mock data"
    words = [_setting(key, given) for key, given in d.paths.items() if given is not None]
    if d.tokenizer_type:
        words.append(f"({d.tokenizer_type})")
    return " ".join(words)


def _checkpoints(config: RunConfig) -> str:
    """Where they come from and go to."""
    c = config.checkpoint
    loaded = f"starts from {c.load_hf}" if c.load_hf else "starts from scratch"
    if c.load:
        loaded = f"loads from {c.load}"
    if c.load and c.load_hf:
        loaded += f", or without a checkpoint there starts from {c.load_hf}"
    if c.save is None:
        return f"{loaded}, saves none (--save is unset)"
    every = f"every {c.save_interval} iterations and " if c.save_interval else ""
    how = ", while training goes on" if c.async_save else ""
    return f"{loaded}, saves to {c.save} {every}at the end{how}"


def _short(number: float) -> str:
    """Three digits and a decimal prefix: 1.34 G."""
    return scaled(number, ("", " k", " M", " G", " T"), step=1000)
