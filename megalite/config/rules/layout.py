"""Rules of the model's shape and its layout over the ranks: pure arithmetic. Imports no torch."""

import math
from collections.abc import Iterator

from megalite.config.rules.finding import Finding, Rule, divisors, each, flag_of, multiples
from megalite.config.run import RunConfig


def heads_fill_hidden(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """hidden % heads, unless the size of a head is given."""
    m = config.model
    heads = m.num_attention_heads
    if m.kv_channels is None and m.hidden_size % heads:
        yield Finding(
            f"--hidden-size {m.hidden_size} is not a multiple of --num-attention-heads {heads}, "
            "and --kv-channels is unset",
            *each("num_attention_heads", divisors(m.hidden_size, heads)),
            *each("hidden_size", multiples(heads, m.hidden_size, 6)),
            {"kv_channels": max(2, m.hidden_size // heads // 2 * 2)},
        )


def heads_fill_groups(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """heads % groups."""
    heads = config.model.num_attention_heads
    groups = config.model.query_groups
    if heads % groups:
        yield Finding(
            f"--num-attention-heads {heads} is not a multiple of --num-query-groups {groups}",
            *each("num_query_groups", divisors(heads, heads)),
            *each("num_attention_heads", multiples(groups, heads, 6)),
        )


def rope_pairs_components(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """An even head size for rotary embeddings."""
    m = config.model
    if m.position_embedding_type == "rope" and m.head_size % 2:
        yield Finding(
            "--position-embedding-type rope rotates pairs of components, but heads have "
            f"{m.head_size} (--hidden-size {m.hidden_size}, --num-attention-heads "
            f"{m.num_attention_heads})",
            {"kv_channels": m.head_size + 1},
            {"position_embedding_type": "learned_absolute"},
            also=("kv_channels",),
        )


def rope_scaling_has_a_range(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """low < high, the factors between which scaled frequencies change gradually."""
    m = config.model
    low = m.rope_low_freq_factor
    high = m.rope_high_freq_factor
    if m.rope_scaling == "llama3" and low >= high:
        yield Finding(
            f"--rope-low-freq-factor {low:g} must be less than --rope-high-freq-factor {high:g}",
            {"rope_high_freq_factor": 4 * low},
            {"rope_low_freq_factor": high / 4},
        )


def sequence_fits_positions(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """seq <= positions."""
    m = config.model
    if m.seq_length > m.positions:
        yield Finding(
            f"--seq-length {m.seq_length} is longer than --max-position-embeddings {m.positions}",
            {"seq_length": m.positions},
            {"max_position_embeddings": m.seq_length},
        )


def tensor_ranks_share(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """heads, groups and ffn % tp: each tensor-parallel rank holds whole heads and an equal share of
    the MLP."""
    m = config.model
    t = config.parallel.tensor_model_parallel_size
    sizes = {"num_attention_heads": m.num_attention_heads, "ffn_hidden_size": m.ffn}
    if m.query_groups != m.num_attention_heads:
        sizes["num_query_groups"] = m.query_groups
    common = math.gcd(*sizes.values())
    for key, size in sizes.items():
        if size % t:
            yield Finding(
                f"{flag_of(key)} {size} cannot be divided among --tp {t} ranks",
                *_tensor_sizes(config, common),
                *_tensor_sizes(config, size),
                *each(key, [n for n in multiples(t, size, 6) if n >= size]),
            )


def sequence_parallel_splits(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """Sequence parallelism needs tensor parallelism, and seq % tp."""
    t = config.parallel.tensor_model_parallel_size
    s = config.model.seq_length
    if not config.parallel.sequence_parallel:
        return
    off = {"sequence_parallel": False}
    if t == 1:
        yield Finding(
            "--sequence-parallel splits the sequence over tensor-parallel ranks, but --tp is 1",
            {"tensor_model_parallel_size": 2},
            off,
        )
    elif s % t:
        yield Finding(
            f"--seq-length {s} is not a multiple of --tp {t}, as --sequence-parallel needs",
            *each("seq_length", multiples(t, s)),
            *_tensor_sizes(config, math.gcd(s, config.model.num_attention_heads)),
            off,
        )


def stages_hold_layers(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """At least one layer for every pipeline stage, where a rank holds one."""
    p = config.parallel.pipeline_model_parallel_size
    layers = config.model.num_layers
    if p > layers and config.pipeline.chunks == 1:
        yield Finding(
            f"--pp {p} stages for --num-layers {layers}: each stage needs at least one layer",
            *each("pipeline_model_parallel_size", range(layers, 0, -1)),
            {"num_layers": p},
        )


def ranks_fill_layout(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """world % (tp * pp)."""
    t = config.parallel.tensor_model_parallel_size
    p = config.parallel.pipeline_model_parallel_size
    if world_size % (t * p) == 0:
        return
    # Layouts that fit, the ones that use most ranks and are nearest to this one first.
    pairs = [(a, b) for a in divisors(world_size, t) for b in divisors(world_size // a, p)]
    pairs.sort(key=lambda pair: (-pair[0] * pair[1], abs(pair[0] - t)))
    layouts = []
    for a, b in pairs:
        layouts.append({"tensor_model_parallel_size": a, "pipeline_model_parallel_size": b})
    ranks = "1 rank" if world_size == 1 else f"{world_size} ranks"
    yield Finding(
        f"{ranks} cannot be divided into groups of --tp {t} x --pp {p} = {t * p}",
        *each("world_size", multiples(t * p, world_size)),
        *layouts,
    )


def backend_fits_device(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """NCCL works between GPUs only, gloo between CPUs."""
    p = config.parallel
    if p.device == "cpu" and p.distributed_backend == "nccl":
        yield Finding(
            "--distributed-backend nccl works on GPUs only, but --device is cpu",
            {"distributed_backend": "gloo"},
            {"device": "cuda"},
        )
    if p.device == "cuda" and p.distributed_backend == "gloo":
        yield Finding(
            "--distributed-backend gloo cannot send tensors of GPUs between stages, but --device "
            "is cuda",
            {"distributed_backend": "nccl"},
            {"device": "cpu"},
        )


def _tensor_sizes(config: RunConfig, shared: int) -> list[dict[str, int]]:
    """Possible fixes: tensor-parallel sizes that divide `shared`, no larger than now."""
    sizes = divisors(shared, config.parallel.tensor_model_parallel_size)
    return each("tensor_model_parallel_size", sizes)


LAYOUT_RULES: tuple[Rule, ...] = (
    heads_fill_hidden,
    heads_fill_groups,
    rope_pairs_components,
    rope_scaling_has_a_range,
    sequence_fits_positions,
    tensor_ranks_share,
    sequence_parallel_splits,
    stages_hold_layers,
    ranks_fill_layout,
    backend_fits_device,
)
