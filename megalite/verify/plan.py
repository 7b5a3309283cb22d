"""What tools/verify_layouts.py compares: one step in two layouts, shrunk if asked. No torch."""

import re
from dataclasses import dataclass, replace
from typing import Annotated, Any

from megalite.config import cli, validate
from megalite.config.flags import read_own_flags
from megalite.config.problem import ConfigError, Problem
from megalite.config.run import RunConfig, options, to_flat, with_values
from megalite.fields import Field
from megalite.nn.config import ModelConfig, RecomputeConfig
from megalite.parallel.config import OF_SPLIT
from megalite.parallel.launch import LaunchInfo

STEP_FIELDS = "micro_batch_size global_batch_size seed rng_scheme precision bf16 fp16".split()
"""What the numbers of one step depend on, beside the model, the layout and the data."""
SHRUNK_VOCABULARY = 1000
"""Entries of the vocabulary where it was the tokenizer's and the model is shrunk."""


@dataclass(frozen=True)
class VerifyOptions(cli.ConfigFile):
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
    # Under a launcher, which decides the number of ranks, records need a shared folder.
    if launch.source != "none" and own.ranks is not None:
        message = f"--ranks: {launch.source} has started the ranks already"
        problems.append(Problem(message, "leave out --ranks"))
    if launch.source != "none" and own.work_folder is None:
        message = f"under {launch.source}, ranks need a folder to leave their records"
        fix = "--work-folder FOLDER, one that every rank can write to"
        problems.append(Problem(message, fix))
    # The chosen layout.
    asked = cli.build_config(own.config, flags, problems)
    real_data = "data_path" in flags or "train_data_path" in flags
    config = _one_step(asked, real_data=real_data, shrinks=own.shrink)
    if config.data.mock_data and config.model.vocab_size is None:
        message = "mock data is used here, so the size of the tokenizer's vocabulary is not known"
        fix = "--vocab-size N, or --shrink, or --data-path PREFIX"
        raise ConfigError([Problem(message, fix, ("vocab_size",))])
    p = asked.parallel
    ranks = launch.world_size
    if launch.source == "none":
        fitting = p.tensor_model_parallel_size * p.pipeline_model_parallel_size
        ranks = own.ranks or p.world_size or fitting
    problems = [*validate.check(config, ranks), *_masks_differ(config)]
    if problems:
        start = re.compile(r"start (\d+) ranks")
        raise ConfigError([replace(p, fix=start.sub(r"--ranks \1", p.fix)) for p in problems])
    chosen = validate.resolve(config, ranks)
    if own.shrink:
        chosen = shrunk(chosen, ranks, own.reference_dp)
    # The reference layout.
    reference = _reference(chosen, own)
    reference_ranks = own.reference_tp * own.reference_pp * own.reference_dp
    problems = validate.check(reference, reference_ranks)
    if problems:
        where = "reference layout: "
        raise ConfigError([replace(p, message=where + p.message) for p in problems])
    reference = validate.resolve(reference, reference_ranks)
    return Plan(
        _packed(chosen, asked),
        ranks,
        _packed(reference, asked),
        reference_ranks=reference_ranks,
        folder=own.work_folder,
    )


def _one_step(config: RunConfig, real_data: bool, shrinks: bool) -> RunConfig:
    """What matters of a configuration for the numbers of one step; mock data unless `real_data`."""
    flat = to_flat(config)
    values = {key: flat[key] for key in STEP_FIELDS}
    values |= dict(train_iters=1, eval_interval=0, eval_iters=0, lr_decay_style="constant")
    step = RunConfig(config.model, config.parallel, config.recompute, bert=config.bert)
    if real_data:
        step = replace(step, data=config.data)
        values["valid_data_path"] = None  # nothing is evaluated
    else:
        values["mock_data"] = True
        if config.model.vocab_size is None and shrinks:
            values["vocab_size"] = SHRUNK_VOCABULARY
    return with_values(step, values | {"world_size": None})  # the number of ranks is known


def _packed(config: RunConfig, asked: RunConfig) -> RunConfig:
    """With documents kept apart as asked: in mock data too, whose documents need no tokenizer
    here."""
    keys = ("reset_position_ids", "reset_attention_mask")
    return with_values(config, {key: getattr(asked.data, key) for key in keys})


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


def _reference(config: RunConfig, own: VerifyOptions) -> RunConfig:
    """The same step in the layout of --reference-*, in its plainest form."""
    sizes = {
        "tensor_model_parallel_size": own.reference_tp,
        "pipeline_model_parallel_size": own.reference_pp,
    }
    plain = replace(config, recompute=RecomputeConfig())
    for key in OF_SPLIT:
        sizes[key] = options()[key].default
    schedule = {
        "pipeline_schedule": "1f1b",
        "num_virtual_stages_per_pipeline_rank": 1,
        "microbatch_group_size_per_virtual_pipeline_stage": None,
    }
    return with_values(plain, sizes | schedule | {"sequence_parallel": False})


def shrunk(config: RunConfig, world_size: int, other_replicas: int = 1) -> RunConfig:
    """A resolved configuration made small: fewer and narrower layers, a shorter sequence, fewer
    entries and samples.

    Layout and structure stay: shares of ranks, grouped queries, given splits, padding, recompute.
    The global batch can still be divided over `other_replicas`, if it could before.
    """
    d = config.data
    t = config.parallel.tensor_model_parallel_size
    pipeline = config.pipeline
    stages = pipeline.stages
    # The batch. One microbatch more than there are stages, or than a group of them has, shows the
    # pipeline's steady state.
    group = config.parallel.microbatch_group_size_per_virtual_pipeline_stage or 0
    replicas = world_size // (t * pipeline.ranks)
    rows = min(d.micro_batch_size, 2)
    most = d.global_batch_size // (d.micro_batch_size * replicas)
    fitting = (m for m in range(max(stages, group) + 1, most) if m * replicas % other_replicas == 0)
    microbatches = next(fitting, most)
    values = {"micro_batch_size": rows, "global_batch_size": rows * replicas * microbatches}
    # The model. The ids of real data must still fit its vocabulary.
    model = _shrunk_model(config.model, t, stages)
    if config.parallel.split_is_given:
        counts = _shrunk_split(config)
        model = replace(model, num_layers=sum(counts))
        values |= _split_values(config, counts)
    if not d.mock_data:
        values["vocab_size"] = config.model.vocab_size
    # Layers that are recomputed together.
    values["recompute_num_layers"] = 1
    if config.recompute.granularity == "full":
        most = model.num_layers // stages
        values["recompute_num_layers"] = min(config.recompute.recompute_num_layers, most)
    return with_values(replace(config, model=model), values)


def _shrunk_split(config: RunConfig) -> list[int]:
    """Layers of each stage where flags say how they are divided: 1 for the smallest stages, 2 for
    the next larger ones, and so on."""
    counts = list(map(len, config.layers_of_stages))
    sizes = sorted(set(counts))
    return [1 + sizes.index(count) for count in counts]


def _split_values(config: RunConfig, counts: list[int]) -> dict[str, Any]:
    """What the flags of the split become where they give these layers of each stage."""
    parallel = config.parallel
    if parallel.pipeline_split is not None:
        return {"pipeline_split": (",".join(map(str, counts)),)}
    of_rank = [0] * parallel.pipeline_model_parallel_size
    for stage, count in enumerate(counts):
        of_rank[config.pipeline.rank_of(stage)] += count
    values = {}
    if parallel.decoder_first_pipeline_num_layers is not None:
        values["decoder_first_pipeline_num_layers"] = of_rank[0]
    if parallel.decoder_last_pipeline_num_layers is not None:
        values["decoder_last_pipeline_num_layers"] = of_rank[-1]
    return values


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
