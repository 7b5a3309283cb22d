"""What tools/verify_layouts.py compares: one step in two layouts, shrunk if asked. Imports no torch."""

import re
from dataclasses import dataclass, replace
from typing import Any

from megalite.config import cli, validate
from megalite.config.run import ConfigError, Problem, RunConfig, with_preset, with_values
from megalite.config.training import TrainingConfig
from megalite.data.config import DataConfig
from megalite.nn.config import ModelConfig, RecomputeConfig
from megalite.optim.config import OptimizerConfig
from megalite.parallel.launch import LaunchInfo

OWN_NUMBERS = {"--ranks": 8, "--reference-tp": 1, "--reference-pp": 1, "--reference-dp": 1}
"""Flags of the tool itself that take a number, each with an example."""


@dataclass(frozen=True)
class Plan:
    """Two resolved configurations of the same step, each with its number of ranks."""

    chosen: RunConfig
    ranks: int
    reference: RunConfig
    reference_ranks: int
    folder: str | None
    """Where ranks leave their records: --work-folder. None: a temporary folder of this machine."""


def plan(argv: list[str], launch: LaunchInfo) -> Plan:
    """Read the command line. Raises ConfigError with every problem of it, of its file and of both layouts."""
    shrinks, folder, numbers, rest, problems = _own_flags(argv)
    file, flags, more = cli.read_flags(rest)
    values, in_file = cli.read_yaml(file) if file is not None else ({}, [])
    problems += [*in_file, *more]
    if launch.source != "none":
        if "--ranks" in numbers:
            problems.append(
                Problem(
                    f"--ranks: {launch.source} has started the ranks already", "leave out --ranks"
                )
            )
        if folder is None:
            fix = "--work-folder FOLDER, one that every rank can write to"
            problems.append(
                Problem(f"under {launch.source}, ranks need a place to leave their records", fix)
            )
    if problems:
        raise ConfigError(problems)
    asked = with_values(RunConfig(), with_preset(values | flags))
    config = _one_step(asked, not {"data_path", "train_data_path"}.isdisjoint(flags), shrinks)
    p = config.parallel
    fitting = (
        asked.parallel.world_size or p.tensor_model_parallel_size * p.pipeline_model_parallel_size
    )
    if config.data.mock_data and config.model.vocab_size is None:
        message = "data is made up here, so the size of the tokenizer's vocabulary is not known"
        raise ConfigError(
            [
                Problem(
                    message, "--vocab-size N, or --shrink, or --data-path PREFIX", ("vocab_size",)
                )
            ]
        )
    ranks = numbers.get("--ranks", fitting) if launch.source == "none" else launch.world_size
    if problems := [*validate.check(config, ranks), *_masks_differ(config)]:
        fixes = [re.sub(r"start (\d+) ranks", r"--ranks \1", p.fix) for p in problems]
        raise ConfigError([replace(p, fix=fix) for p, fix in zip(problems, fixes)])
    chosen = validate.resolve(config, ranks)
    tensor, pipeline, data = (numbers.get(f"--reference-{axis}", 1) for axis in ("tp", "pp", "dp"))
    chosen = shrunk(chosen, ranks, data) if shrinks else chosen
    reference, reference_ranks = _reference(chosen, tensor, pipeline, data)
    if problems := validate.check(reference, reference_ranks):
        raise ConfigError(
            [Problem(f"reference layout: {p.message}", p.fix, p.flags) for p in problems]
        )
    reference = validate.resolve(reference, reference_ranks)
    return Plan(_packed(chosen, asked), ranks, _packed(reference, asked), reference_ranks, folder)


def _own_flags(
    argv: list[str],
) -> tuple[bool, str | None, dict[str, int], list[str], list[Problem]]:
    """(--shrink, --work-folder, numbers by flag, the other arguments, problems)."""
    shrinks, folder, numbers, rest, problems = False, None, {}, [], []
    words = list(argv)
    while words:
        word = words.pop(0)
        name, joined, text = word.partition("=")
        flag = name.replace("_", "-")
        if flag == "--shrink":
            shrinks = True
            if joined:
                problems.append(Problem(f"{word}: --shrink takes no value", "--shrink"))
            continue
        if flag not in OWN_NUMBERS and flag != "--work-folder":
            rest.append(word)
            continue
        if not joined and words and not words[0].startswith("--"):
            text = words.pop(0)
        if flag == "--work-folder" and text:
            folder = text
        elif text.isdecimal() and int(text) > 0:
            numbers[flag] = int(text)
        else:
            wanted = "a folder" if flag == "--work-folder" else "a whole number from 1"
            fix = f"for example {flag} {OWN_NUMBERS.get(flag, 'FOLDER')}"
            problems.append(Problem(f"{flag}: {text!r} is not {wanted}", fix))
    return shrinks, folder, numbers, rest, problems


def _one_step(config: RunConfig, real_data: bool, shrinks: bool) -> RunConfig:
    """What matters of a configuration for the numbers of one step; made-up data unless `real_data`."""
    data, model = config.data, config.model
    if not real_data:
        data = DataConfig(
            mock_data=True,
            micro_batch_size=data.micro_batch_size,
            global_batch_size=data.global_batch_size,
        )
        if model.vocab_size is None and shrinks:  # it was the tokenizer's
            model = replace(model, vocab_size=1000)
    else:
        data = replace(data, valid_data_path=None)  # nothing is evaluated
    training = TrainingConfig(
        train_iters=1,
        eval_interval=0,
        eval_iters=0,
        seed=config.training.seed,
        rng_scheme=config.training.rng_scheme,
    )
    optimizer = OptimizerConfig(
        precision=config.optimizer.precision, bf16=config.optimizer.bf16, lr_decay_style="constant"
    )
    parallel = replace(config.parallel, world_size=None)  # it is the number of ranks here
    return RunConfig(
        model, parallel, config.recompute, optimizer, data, config.bert, training=training
    )


def _packed(config: RunConfig, asked: RunConfig) -> RunConfig:
    """With documents kept apart as asked: in made-up data too, whose documents need no tokenizer here."""
    kept = {key: getattr(asked.data, key) for key in ("reset_position_ids", "reset_attention_mask")}
    return replace(config, data=replace(config.data, **kept))


def _masks_differ(config: RunConfig) -> list[Problem]:
    m = config.model
    if config.training.rng_scheme == "global" or m.attention_dropout == m.hidden_dropout == 0:
        return []
    message = "--rng-scheme megatron drops other elements in every layout: the numbers of two layouts rightly differ"
    fix = "--rng-scheme global, or --attention-dropout 0 --hidden-dropout 0"
    return [Problem(message, fix, ("rng_scheme", "attention_dropout", "hidden_dropout"))]


def _reference(config: RunConfig, tensor: int, pipeline: int, data: int) -> tuple[RunConfig, int]:
    """The same step in a layout of these sizes, in its plainest form, and its number of ranks."""
    parallel = replace(
        config.parallel,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        sequence_parallel=False,
        pipeline_schedule="1f1b",
    )
    return replace(config, parallel=parallel, recompute=RecomputeConfig()), tensor * pipeline * data


def shrunk(config: RunConfig, world_size: int, other_replicas: int = 1) -> RunConfig:
    """A resolved configuration made small: fewer and narrower layers, a shorter sequence, fewer entries and samples.
    Layout and structure stay: shares of ranks, grouped queries, uneven stages, padding, recompute. The global
    batch can still be divided over `other_replicas`, if it could before."""
    p, d = config.parallel, config.data
    t, stages = p.tensor_model_parallel_size, p.pipeline_model_parallel_size
    model = _shrunk_model(config.model, t, stages)
    replicas = world_size // (t * stages)
    rows = min(d.micro_batch_size, 2)
    most = d.global_batch_size // (d.micro_batch_size * replicas)
    # One more than there are stages, so that the pipeline's steady state is seen.
    fitting = (m for m in range(stages + 1, most) if m * replicas % other_replicas == 0)
    microbatches = next(fitting, most)
    if not d.mock_data:  # ids must go on to fit
        model = replace(model, vocab_size=config.model.vocab_size)
    full = config.recompute.granularity == "full"
    together = min(config.recompute.recompute_num_layers, model.num_layers // stages) if full else 1
    return replace(
        config,
        model=model,
        recompute=replace(config.recompute, recompute_num_layers=together),
        data=replace(d, micro_batch_size=rows, global_batch_size=rows * replicas * microbatches),
    )


def _shrunk_model(m: ModelConfig, t: int, stages: int) -> ModelConfig:
    queries = m.num_attention_heads // m.query_groups
    shared = t if m.query_groups % t == 0 else 1  # groups that ranks must be able to share
    groups = shared * min(2, m.query_groups // shared)
    heads = groups * min(queries, 2)
    head_size = min(m.head_size, 8)
    # The ratio of heads to hidden size stays, and so that of MLP to hidden size.
    hidden = max(
        2, round(heads * head_size * m.hidden_size / (m.num_attention_heads * m.head_size))
    )
    hidden = min(m.hidden_size, hidden)
    length = min(m.seq_length, 16 * t)
    unit = m.make_vocab_size_divisible_by
    padded, small_unit = m.vocab_size % (unit * t), min(unit, 16)
    vocabulary = 8 * small_unit * t + (
        padded % (small_unit * t) or int(padded > 0)
    )  # what is padded stays padded
    vocabulary, unit = min((vocabulary, small_unit), (m.vocab_size, unit))
    sizes: dict[str, Any] = {
        "num_layers": min(m.num_layers, 2 * stages + int(m.num_layers % stages > 0)),
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "kv_channels": head_size,
        "ffn_hidden_size": min(m.ffn, t * max(1, round(hidden * m.ffn / (m.hidden_size * t)))),
        "seq_length": length,
        "max_position_embeddings": min(
            m.positions, length if m.positions == m.seq_length else 2 * length
        ),
        "make_vocab_size_divisible_by": unit,
        "vocab_size": vocabulary,
        # Products then have about the size they had.
        "init_method_std": m.init_method_std * (m.hidden_size / hidden) ** 0.5,
    }
    return replace(m, **sizes)
