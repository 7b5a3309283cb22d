"""What tools/verify_layouts.py compares: one step in two layouts, shrunk if asked. No torch."""

import re
from dataclasses import dataclass, replace
from typing import Annotated

from megalite.config import validate
from megalite.config.cli import ConfigFile
from megalite.config.flags import read_own_flags
from megalite.config.problem import ConfigError, Problem
from megalite.config.run import RunConfig, options, with_preset, with_values
from megalite.config.training import TrainingConfig
from megalite.config.yaml_file import read_yaml
from megalite.data.config import DataConfig
from megalite.fields import Field
from megalite.nn.config import ModelConfig, RecomputeConfig
from megalite.optim.config import OptimizerConfig
from megalite.parallel.launch import LaunchInfo

SHRUNK_VOCABULARY = 1000
"""Entries of the vocabulary where it was the tokenizer's and the model is shrunk."""


@dataclass(frozen=True)
class VerifyOptions(ConfigFile):
    """What is compared, and with what."""

    ranks: Annotated[int | None, Field(minimum=1, example=8)] = None
    """Ranks of the layout, started here unless a launcher has. Unset: tp x pp."""
    shrink: bool = False
    """Fewer and narrower layers, same structure and layout."""
    reference_tp: Annotated[int, Field(minimum=1)] = 1
    """Tensor-parallel size of the layout to compare with."""
    reference_pp: Annotated[int, Field(minimum=1)] = 1
    """Pipeline stages of the layout to compare with."""
    reference_dp: Annotated[int, Field(minimum=1)] = 1
    """Data-parallel size of the layout to compare with."""
    work_folder: str | None = None
    """Folder where ranks leave what they computed. Unset: a temporary folder of this machine."""


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
    """Read the command line. Raises ConfigError with every problem of it, of its file and of both
    layouts."""
    given, flags, problems = read_own_flags(VerifyOptions, argv, options().values())
    own = VerifyOptions(**given)
    values = {}
    if own.config is not None:
        values, in_file = read_yaml(own.config)
        problems = [*in_file, *problems]
    if launch.source != "none":
        problems += _under_a_launcher(own, launch)
    if problems:
        raise ConfigError(problems)
    # The chosen layout.
    asked = with_values(RunConfig(), with_preset(values | flags))
    real_data = "data_path" in flags or "train_data_path" in flags
    config = _one_step(asked, real_data=real_data, shrinks=own.shrink)
    if config.data.mock_data and config.model.vocab_size is None:
        message = "mock data is used here, so the size of the tokenizer's vocabulary is not known"
        fix = "--vocab-size N, or --shrink, or --data-path PREFIX"
        raise ConfigError([Problem(message, fix, ("vocab_size",))])
    ranks = _number_of_ranks(asked, own, launch)
    problems = [*validate.check(config, ranks), *_masks_differ(config)]
    if problems:
        fixes = [re.sub(r"start (\d+) ranks", r"--ranks \1", p.fix) for p in problems]
        raise ConfigError([replace(p, fix=fix) for p, fix in zip(problems, fixes)])
    chosen = validate.resolve(config, ranks)
    if own.shrink:
        chosen = shrunk(chosen, ranks, own.reference_dp)
    # The reference layout.
    reference = _reference(chosen, own.reference_tp, own.reference_pp)
    reference_ranks = own.reference_tp * own.reference_pp * own.reference_dp
    problems = validate.check(reference, reference_ranks)
    if problems:
        problems = [replace(p, message=f"reference layout: {p.message}") for p in problems]
        raise ConfigError(problems)
    reference = validate.resolve(reference, reference_ranks)
    return Plan(
        _packed(chosen, asked),
        ranks,
        _packed(reference, asked),
        reference_ranks=reference_ranks,
        folder=own.work_folder,
    )


def _under_a_launcher(own: VerifyOptions, launch: LaunchInfo) -> list[Problem]:
    """Problems of options that a launcher decides, or that need a shared folder."""
    problems = []
    if own.ranks is not None:
        message = f"--ranks: {launch.source} has started the ranks already"
        problems.append(Problem(message, "leave out --ranks"))
    if own.work_folder is None:
        message = f"under {launch.source}, ranks need a folder to leave their records"
        fix = "--work-folder FOLDER, one that every rank can write to"
        problems.append(Problem(message, fix))
    return problems


def _number_of_ranks(asked: RunConfig, own: VerifyOptions, launch: LaunchInfo) -> int:
    """Ranks of the chosen layout: the launcher's, --ranks, --world-size, or tp x pp."""
    p = asked.parallel
    if launch.source != "none":
        return launch.world_size
    fitting = p.tensor_model_parallel_size * p.pipeline_model_parallel_size
    return own.ranks or p.world_size or fitting


def _one_step(config: RunConfig, real_data: bool, shrinks: bool) -> RunConfig:
    """What matters of a configuration for the numbers of one step; mock data unless `real_data`."""
    data = config.data
    model = config.model
    if real_data:
        data = replace(data, valid_data_path=None)  # nothing is evaluated
    else:
        data = DataConfig(
            mock_data=True,
            micro_batch_size=data.micro_batch_size,
            global_batch_size=data.global_batch_size,
        )
        if model.vocab_size is None and shrinks:
            model = replace(model, vocab_size=SHRUNK_VOCABULARY)
    training = TrainingConfig(
        train_iters=1,
        eval_interval=0,
        eval_iters=0,
        seed=config.training.seed,
        rng_scheme=config.training.rng_scheme,
    )
    precision = config.optimizer.precision
    optimizer = OptimizerConfig(
        precision=precision, bf16=config.optimizer.bf16, lr_decay_style="constant"
    )
    return RunConfig(
        model=model,
        parallel=replace(config.parallel, world_size=None),  # the number of ranks is known
        recompute=config.recompute,
        optimizer=optimizer,
        data=data,
        bert=config.bert,
        training=training,
    )


def _packed(config: RunConfig, asked: RunConfig) -> RunConfig:
    """With documents kept apart as asked: in mock data too, whose documents need no tokenizer
    here."""
    data = replace(
        config.data,
        reset_position_ids=asked.data.reset_position_ids,
        reset_attention_mask=asked.data.reset_attention_mask,
    )
    return replace(config, data=data)


def _masks_differ(config: RunConfig) -> list[Problem]:
    """A problem when dropout depends on the layout."""
    m = config.model
    if config.training.rng_scheme == "global" or m.attention_dropout == m.hidden_dropout == 0:
        return []
    message = (
        "--rng-scheme megatron drops other elements in every layout: "
        "the numbers of two layouts rightly differ"
    )
    fix = "--rng-scheme global, or --attention-dropout 0 --hidden-dropout 0"
    return [Problem(message, fix, ("rng_scheme", "attention_dropout", "hidden_dropout"))]


def _reference(config: RunConfig, tensor: int, pipeline: int) -> RunConfig:
    """The same step in a layout of these sizes, in its plainest form."""
    parallel = replace(
        config.parallel,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        sequence_parallel=False,
        pipeline_schedule="1f1b",
    )
    return replace(config, parallel=parallel, recompute=RecomputeConfig())


def shrunk(config: RunConfig, world_size: int, other_replicas: int = 1) -> RunConfig:
    """A resolved configuration made small: fewer and narrower layers, a shorter sequence, fewer
    entries and samples.

    Layout and structure stay: shares of ranks, grouped queries, uneven stages, padding, recompute.
    The global batch can still be divided over `other_replicas`, if it could before.
    """
    d = config.data
    t = config.parallel.tensor_model_parallel_size
    stages = config.parallel.pipeline_model_parallel_size
    # The batch. One microbatch more than there are stages shows the pipeline's steady state.
    replicas = world_size // (t * stages)
    rows = min(d.micro_batch_size, 2)
    most = d.global_batch_size // (d.micro_batch_size * replicas)
    fitting = (m for m in range(stages + 1, most) if m * replicas % other_replicas == 0)
    microbatches = next(fitting, most)
    data = replace(d, micro_batch_size=rows, global_batch_size=rows * replicas * microbatches)
    # The model. The ids of real data must still fit its vocabulary.
    model = _shrunk_model(config.model, t, stages)
    if not d.mock_data:
        model = replace(model, vocab_size=config.model.vocab_size)
    # Layers that are recomputed together.
    together = 1
    if config.recompute.granularity == "full":
        together = min(config.recompute.recompute_num_layers, model.num_layers // stages)
    recompute = replace(config.recompute, recompute_num_layers=together)
    return replace(config, model=model, recompute=recompute, data=data)


def _shrunk_model(m: ModelConfig, t: int, stages: int) -> ModelConfig:
    """The model made small, for t tensor-parallel ranks and this many stages."""
    # Heads: groups that ranks share stay shared, at most two queries each.
    queries = m.num_attention_heads // m.query_groups
    shared = t if m.query_groups % t == 0 else 1
    groups = shared * min(2, m.query_groups // shared)
    heads = groups * min(queries, 2)
    head_size = min(m.head_size, 8)
    # Widths: the ratio of heads to hidden size stays, and so that of MLP to hidden size.
    width = m.num_attention_heads * m.head_size
    hidden = min(m.hidden_size, max(2, round(heads * head_size * m.hidden_size / width)))
    inner = t * max(1, round(hidden * m.ffn / (m.hidden_size * t)))
    # Lengths.
    length = min(m.seq_length, 16 * t)
    positions = length if m.positions == m.seq_length else 2 * length
    # The vocabulary: what is padded stays padded.
    unit = m.make_vocab_size_divisible_by
    small_unit = min(unit, 16)
    beyond = m.vocab_size % (unit * t)
    vocabulary = 8 * small_unit * t
    if beyond:
        vocabulary += beyond % (small_unit * t) or 1
    vocabulary, unit = min((vocabulary, small_unit), (m.vocab_size, unit))
    return replace(
        m,
        num_layers=min(m.num_layers, 2 * stages + int(m.num_layers % stages > 0)),
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=head_size,
        ffn_hidden_size=min(m.ffn, inner),
        seq_length=length,
        max_position_embeddings=min(m.positions, positions),
        make_vocab_size_divisible_by=unit,
        vocab_size=vocabulary,
        # Products then have about the size they had.
        init_method_std=m.init_method_std * (m.hidden_size / hidden) ** 0.5,
    )
