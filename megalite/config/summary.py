"""What a run is, in some twenty lines. Imports no torch."""

import textwrap
from pathlib import Path

from megalite.config.estimate import StageEstimate, estimate_stages, microbatches, model_parameters
from megalite.config.help import WIDEST
from megalite.config.rules.finding import data_parallel_size
from megalite.config.run import RunConfig, options
from megalite.config.validate import chosen
from megalite.config.yaml_file import to_yaml

LABEL_COLUMNS = 16
"""Columns before the text of a line."""
MOST_CONFIGS = 99
"""Configurations kept in one folder."""


def summary_lines(config: RunConfig, world_size: int) -> list[str]:
    """What a resolved configuration amounts to on this many ranks: model, layout, memory, batch,
    length, learning rate, data, checkpoints, and the flags that make it."""
    stages = estimate_stages(config, world_size)
    fullest = max(range(len(stages)), key=lambda stage: stages[stage].total_bytes)
    rows = {
        "model": _model(config),
        "ranks": _layout(config, world_size),
        "parameters": (
            f"{_short(model_parameters(config))}; "
            f"{_short(stages[fullest].parameters)} on a rank of stage {fullest}"
        ),
        "layers": _layers(config, stages),
        "memory": _memory(stages[fullest], fullest),
        "global batch": (
            f"{config.data.global_batch_size} sequences of {config.model.seq_length} tokens, "
            f"{config.data.micro_batch_size} a microbatch"
        ),
        "microbatches": _microbatches(config, world_size),
        "length": _length(config),
        "learning rate": _learning_rate(config),
        "data": _data(config),
        "checkpoints": _checkpoints(config),
        "flags": _flags(config, world_size),
    }
    lines = []
    for label, text in rows.items():
        lines += textwrap.wrap(
            text,
            WIDEST,
            initial_indent=f"  {label}".ljust(LABEL_COLUMNS),
            subsequent_indent=" " * LABEL_COLUMNS,
            break_long_words=False,
            break_on_hyphens=False,
        )
    return lines


def keep_config(config: RunConfig, folder: str) -> str:
    """Write the whole configuration to config.yaml in a folder, or, where other ones are there
    already, to config-2.yaml and so on. Returns a line for the log that names the file, or says why
    it could not be written, which ends no training."""
    text = to_yaml(config)
    names = ("config.yaml", *(f"config-{number}.yaml" for number in range(2, MOST_CONFIGS + 1)))
    for name in names:
        path = Path(folder) / name
        try:
            if not path.exists():
                with open(path, "x", encoding="utf-8") as file:
                    file.write(text)
            if path.read_text(encoding="utf-8") == text:
                return f"the whole configuration is in {path}"
        except OSError as error:
            return f"the configuration cannot be written to {path}: {error.strerror}"
    return f"{folder} holds {MOST_CONFIGS} other configurations: this one is not written"


def _model(config: RunConfig) -> str:
    """What kind of model it is, its precision and its dropout."""
    m = config.model
    words = [
        m.architecture.upper(),
        f"{m.num_layers} layers",
        f"hidden {m.hidden_size}",
        f"{m.num_attention_heads} heads",
        f"vocabulary {m.vocab_size}",
        config.optimizer.precision,
        f"dropout {m.hidden_dropout:g}, {m.attention_dropout:g} in attention",
    ]
    if config.is_bert:
        words += [
            f"{m.norm_placement}-norm",
            f"pairs {config.bert.bert_pair}",
            f"{config.bert.mask_prob:.0%} of the tokens masked",
        ]
    return ", ".join(words)


def _layout(config: RunConfig, world_size: int) -> str:
    p = config.parallel
    text = (
        f"{world_size} = tensor {p.tensor_model_parallel_size} "
        f"x pipeline {p.pipeline_model_parallel_size} "
        f"x data {data_parallel_size(config, world_size)}"
    )
    return text + (", sequence parallel" if p.sequence_parallel else "")


def _layers(config: RunConfig, stages: list[StageEstimate]) -> str:
    by_stage = " + ".join(str(len(stage.layers)) for stage in stages)
    text = f"{by_stage} ({config.parallel.pipeline_schedule})"
    if config.recompute.granularity != "none":
        text += f", recompute {config.recompute.granularity}"
    return text


def _memory(stage: StageEstimate, number: int) -> str:
    return (
        f"roughly {_short(stage.total_bytes)}B on a rank of stage {number}, the fullest: "
        f"{_short(stage.state_bytes)}B of weights and optimizer, "
        f"{_short(stage.activation_bytes)}B of activations"
    )


def _microbatches(config: RunConfig, world_size: int) -> str:
    count = microbatches(config, world_size)
    bubble = (config.parallel.pipeline_model_parallel_size - 1) / count
    return f"{count} for each data-parallel rank; pipeline bubble {bubble:.1%} of the ideal time"


def _length(config: RunConfig) -> str:
    iterations = config.training.train_iters
    samples = config.data.global_batch_size * iterations
    tokens = _short(samples * config.model.seq_length)
    return f"{iterations} iterations, {samples} sequences, {tokens} tokens"


def _learning_rate(config: RunConfig) -> str:
    o = config.optimizer
    text = f"{o.lr:g}"
    if o.lr_warmup_iters:
        text += f" after {o.lr_warmup_iters} iterations of warm-up"
    if o.lr_decay_style == "constant":
        text += ", constant"
    elif o.lr_decay_style == "inverse-square-root":
        text += f", inverse-square-root, at least {o.lowest_lr:g}"
    else:
        text += f", {o.lr_decay_style} to {o.lowest_lr:g} at iteration {o.lr_decay_iters}"
    return f"{text} ({o.optimizer})"


def _data(config: RunConfig) -> str:
    """Where the tokens come from."""
    d = config.data
    if d.mock_data:
        return "mock data"
    words = []
    for key, given in d.paths.items():
        if given is not None:
            words.append(options()[key].setting(given))
    if d.tokenizer_type:
        words.append(f"({d.tokenizer_type})")
    return " ".join(words)


def _checkpoints(config: RunConfig) -> str:
    """Where they come from and go to."""
    c = config.checkpoint
    loaded = f"loads from {c.load}" if c.load else "starts from scratch"
    if c.save is None:
        return f"{loaded}, saves none (--save is unset)"
    every = "at the end"
    if c.save_interval:
        every = f"every {c.save_interval} iterations and at the end"
    return f"{loaded}, saves to {c.save} {every}"


def _flags(config: RunConfig, world_size: int) -> str:
    """The command line that makes the configuration."""
    values = chosen(config, world_size)
    return " ".join(options()[key].setting(value) for key, value in values.items()) or "defaults"


def _short(number: float) -> str:
    """Three digits and a decimal prefix: 1.34 G."""
    for unit in ("", " k", " M", " G"):
        if number < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g} T"
