"""Rules of the model's shape and its layout over the ranks: pure arithmetic. Imports no torch."""

import math
from collections.abc import Iterator

from megalite.config.rules.finding import Finding, Rule, divisors, multiples
from megalite.config.run import RunConfig, options


def heads_fill_hidden(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """hidden % heads, unless the size of a head is given."""
    m = config.model
    if m.kv_channels is None and m.hidden_size % m.num_attention_heads:
        yield Finding(
            f"--hidden-size {m.hidden_size} is not a multiple of --num-attention-heads {m.num_attention_heads}, "
            "and --kv-channels is unset",
            ("hidden_size", "num_attention_heads", "kv_channels"),
            (
                *(
                    {"num_attention_heads": n}
                    for n in divisors(m.hidden_size, m.num_attention_heads)
                ),
                *({"hidden_size": h} for h in multiples(m.num_attention_heads, m.hidden_size, 6)),
                {"kv_channels": max(2, m.hidden_size // m.num_attention_heads // 2 * 2)},
            ),
        )


def heads_fill_groups(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """heads % groups."""
    m = config.model
    if m.num_attention_heads % m.query_groups:
        yield Finding(
            f"--num-attention-heads {m.num_attention_heads} is not a multiple of --num-query-groups {m.query_groups}",
            ("num_attention_heads", "num_query_groups"),
            (
                *(
                    {"num_query_groups": g}
                    for g in divisors(m.num_attention_heads, m.num_attention_heads)
                ),
                *(
                    {"num_attention_heads": n}
                    for n in multiples(m.query_groups, m.num_attention_heads, 6)
                ),
            ),
        )


def rope_pairs_components(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """An even head size for rotary embeddings."""
    m = config.model
    if m.position_embedding_type == "rope" and m.head_size % 2:
        yield Finding(
            f"--position-embedding-type rope rotates pairs of components, but heads have {m.head_size} "
            f"(--hidden-size {m.hidden_size}, --num-attention-heads {m.num_attention_heads})",
            ("position_embedding_type", "hidden_size", "num_attention_heads", "kv_channels"),
            ({"kv_channels": m.head_size + 1}, {"position_embedding_type": "learned_absolute"}),
        )


def sequence_fits_positions(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """seq <= positions."""
    m = config.model
    if m.seq_length > m.positions:
        yield Finding(
            f"--seq-length {m.seq_length} is longer than --max-position-embeddings {m.positions}",
            ("seq_length", "max_position_embeddings"),
            ({"seq_length": m.positions}, {"max_position_embeddings": m.seq_length}),
        )


def tensor_ranks_share(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """heads, groups and ffn % tp: each tensor-parallel rank holds whole heads and equal parts of the MLP."""
    m, t = config.model, config.parallel.tensor_model_parallel_size
    parts = [("num_attention_heads", m.num_attention_heads), ("ffn_hidden_size", m.ffn)]
    if m.query_groups != m.num_attention_heads:
        parts.append(("num_query_groups", m.query_groups))
    together = math.gcd(*(size for _, size in parts))
    for key, size in parts:
        if size % t:
            yield Finding(
                f"{options()[key].flag} {size} cannot be divided among --tp {t} ranks",
                (key, "tensor_model_parallel_size"),
                (
                    *_tensor_sizes(config, together),
                    *_tensor_sizes(config, size),
                    *({key: n} for n in multiples(t, size, 6) if n >= size),
                ),
            )


def sequence_parallel_splits(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """Sequence parallelism needs tensor parallelism, and seq % tp."""
    t, s = config.parallel.tensor_model_parallel_size, config.model.seq_length
    if not config.parallel.sequence_parallel:
        return
    if t == 1:
        yield Finding(
            "--sequence-parallel splits the sequence over tensor-parallel ranks, but --tp is 1",
            ("sequence_parallel", "tensor_model_parallel_size"),
            ({"tensor_model_parallel_size": 2}, {"sequence_parallel": False}),
        )
    elif s % t:
        yield Finding(
            f"--seq-length {s} is not a multiple of --tp {t}, as --sequence-parallel needs",
            ("sequence_parallel", "seq_length", "tensor_model_parallel_size"),
            (
                *({"seq_length": n} for n in multiples(t, s)),
                *_tensor_sizes(config, math.gcd(s, config.model.num_attention_heads)),
                {"sequence_parallel": False},
            ),
        )


def stages_hold_layers(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """At least one layer for every pipeline stage."""
    p, layers = config.parallel.pipeline_model_parallel_size, config.model.num_layers
    if p > layers:
        yield Finding(
            f"--pp {p} stages for --num-layers {layers}: each stage needs at least one layer",
            ("pipeline_model_parallel_size", "num_layers"),
            (
                *({"pipeline_model_parallel_size": n} for n in range(layers, 0, -1)),
                {"num_layers": p},
            ),
        )


def ranks_fill_layout(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """world % (tp * pp)."""
    t, p = config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size
    if world_size % (t * p):
        pairs = [(a, b) for a in divisors(world_size, t) for b in divisors(world_size // a, p)]
        pairs.sort(key=lambda pair: (-pair[0] * pair[1], abs(pair[0] - t)))
        yield Finding(
            f"{_ranks(world_size)} cannot be divided into groups of --tp {t} x --pp {p} = {t * p}",
            ("tensor_model_parallel_size", "pipeline_model_parallel_size"),
            (
                *({"world_size": n} for n in multiples(t * p, world_size)),
                *(
                    {"tensor_model_parallel_size": a, "pipeline_model_parallel_size": b}
                    for a, b in pairs
                ),
            ),
        )


def _ranks(count: int) -> str:
    return "1 rank" if count == 1 else f"{count} ranks"


def backend_fits_device(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """NCCL talks between GPUs only, gloo between CPUs."""
    if config.parallel.device == "cpu" and config.parallel.distributed_backend == "nccl":
        yield Finding(
            "--distributed-backend nccl works on GPUs only, but --device is cpu",
            ("device", "distributed_backend"),
            ({"distributed_backend": "gloo"}, {"device": "cuda"}),
        )
    if config.parallel.device == "cuda" and config.parallel.distributed_backend == "gloo":
        yield Finding(
            "--distributed-backend gloo cannot send tensors of GPUs between stages, but --device is cuda",
            ("device", "distributed_backend"),
            ({"distributed_backend": "nccl"}, {"device": "cpu"}),
        )


def replicas_exist(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """--check-replicas compares ranks."""
    if config.training.check_replicas is not None and world_size == 1:
        yield Finding(
            f"--check-replicas {config.training.check_replicas} has no effect with one rank",
            ("check_replicas",),
            ({"check_replicas": None}, {"world_size": 2}),
        )


def _tensor_sizes(config: RunConfig, shared: int) -> list[dict]:
    """Candidates for the tensor-parallel size that divide `shared`, no larger than now."""
    sizes = divisors(shared, config.parallel.tensor_model_parallel_size)
    return [{"tensor_model_parallel_size": size} for size in sizes]


LAYOUT_RULES: tuple[Rule, ...] = (
    heads_fill_hidden,
    heads_fill_groups,
    rope_pairs_components,
    sequence_fits_positions,
    tensor_ranks_share,
    sequence_parallel_splits,
    stages_hold_layers,
    ranks_fill_layout,
    backend_fits_device,
    replicas_exist,
)
