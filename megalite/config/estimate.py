"""What a configuration amounts to, by arithmetic: parameters and memory of each stage, microbatches. Imports no torch.

Parameters are exact. Memory is rough (within some tens of per cent): weights, gradients and optimizer states, and the
activations by the formulas of Korthikanti et al. 2022; not what the allocator, kernels and communication add.
"""

from dataclasses import dataclass

from megalite.config.rules.finding import data_parallel_size
from megalite.config.run import RunConfig
from megalite.pipeline.partition import layers_of_stages


@dataclass(frozen=True)
class StageEstimate:
    """One rank of a pipeline stage."""

    layers: range
    parameters: int
    """Held by the rank, vocabulary padding included."""
    state_bytes: float
    """Weights, gradients, optimizer states."""
    activation_bytes: float
    """Kept between forward and backward at the fullest moment."""

    @property
    def total_bytes(self) -> float:
        """All of it."""
        return self.state_bytes + self.activation_bytes


def model_parameters(config: RunConfig) -> int:
    """Parameters of the whole model, without vocabulary padding."""
    rows = config.model.vocab_size or 0
    return _parameters(config, config.model.num_layers, 1, rows, True, True)


def estimate_stages(config: RunConfig, world_size: int) -> list[StageEstimate]:
    """One rank of every stage of a resolved configuration."""
    m, p = config.model, config.parallel.pipeline_model_parallel_size
    t = config.parallel.tensor_model_parallel_size
    block = m.make_vocab_size_divisible_by * t
    rows = -(-m.vocab_size // block) * block
    stages = []
    for stage, layers in enumerate(layers_of_stages(m, p, config.predicted)):
        parameters = _parameters(config, len(layers), t, rows, stage == 0, stage == p - 1)
        activations = _activation_bytes(
            config, len(layers), microbatches_in_flight(config, world_size, stage)
        )
        if stage == p - 1:
            logits = config.predicted * m.seq_length * config.data.micro_batch_size * rows // t
            activations += 2 * max(4, _element_bytes(config)) * logits
        stages.append(
            StageEstimate(
                layers, parameters, parameters * _bytes_per_parameter(config), activations
            )
        )
    return stages


def microbatches(config: RunConfig, world_size: int) -> int:
    """Microbatches in a step of one data-parallel rank, m, of a resolved configuration."""
    d = config.data
    return d.global_batch_size // (d.micro_batch_size * data_parallel_size(config, world_size))


def microbatches_in_flight(config: RunConfig, world_size: int, stage: int) -> int:
    """Microbatches whose activations a stage holds at the fullest moment."""
    m, p = microbatches(config, world_size), config.parallel.pipeline_model_parallel_size
    return m if config.parallel.pipeline_schedule == "gpipe" else min(p - stage, m)


def _parameters(config: RunConfig, layers: int, t: int, rows: int, first: bool, last: bool) -> int:
    """Parameters of one of t tensor-parallel ranks of a stage, with `rows` rows in the whole word embedding."""
    m = config.model
    h, f, qkv = m.hidden_size, m.ffn, (m.num_attention_heads + 2 * m.query_groups) * m.head_size
    up = 2 * f if m.swiglu else f
    norm = h if m.normalization == "RMSNorm" else 2 * h
    sharded = (qkv + m.num_attention_heads * m.head_size + up + f) * h
    replicated = 2 * norm
    if not m.disable_bias_linear:
        sharded += qkv + up
        replicated += 2 * h
    total = layers * (sharded // t + replicated)
    tables = int(first) + int(last and not (m.tied and first))
    total += tables * (rows // t) * h
    if first and m.position_embedding_type == "learned_absolute":
        total += m.positions * h
    total += norm if (first if m.post_norm else last) else 0
    return total + (_bert_parameters(config, rows // t, norm, first, last) if config.is_bert else 0)


def _bert_parameters(config: RunConfig, rows: int, norm: int, first: bool, last: bool) -> int:
    """What a BERT has beside a GPT's parameters, with `rows` entries of the output layer's bias."""
    h, bias = config.model.hidden_size, int(not config.model.disable_bias_linear)
    total = 2 * h if first else 0  # token types
    if last:
        total += h * h + norm + bias * (h + rows)
        total += h * h + 2 * h + bias * (h + 2) if config.pair_head else 0
    return total


def _element_bytes(config: RunConfig) -> int:
    return {"fp32": 4, "bf16": 2, "fp64": 8}[config.optimizer.precision]


def _bytes_per_parameter(config: RunConfig) -> int:
    """Weight, gradient, optimizer states; with bf16 also the fp32 master weight."""
    o, size = config.optimizer, _element_bytes(config)
    wide = max(4, size)
    states = 2 if o.optimizer == "adam" else int(o.sgd_momentum > 0)
    return size + wide * (1 + states + int(o.precision == "bf16"))


def _activation_bytes(config: RunConfig, layers: int, in_flight: int) -> float:
    """Activations of the layers of one rank. The formulas count 2 bytes an element."""
    m, t = config.model, config.parallel.tensor_model_parallel_size
    grain = config.recompute.granularity
    unit = m.seq_length * config.data.micro_batch_size * m.hidden_size * _element_bytes(config) / 2
    explicit_scores = m.attention_dropout > 0 and grain != "selective"
    scores = 5 * m.num_attention_heads * m.seq_length / m.hidden_size if explicit_scores else 0
    layer = (34 + scores) / t if config.parallel.sequence_parallel else 10 + (24 + scores) / t
    if grain != "full":
        return unit * layer * layers * in_flight
    group = config.recompute.recompute_num_layers
    if config.recompute.recompute_method == "uniform":
        return unit * (2 * -(-layers // group) * in_flight + layer * group)
    return unit * (in_flight * (2 * group + layer * (layers - group)) + layer)


def summary(config: RunConfig, world_size: int) -> str:
    """A table of what a resolved configuration amounts to on this many ranks."""
    p, m = config.parallel, config.model
    stages = estimate_stages(config, world_size)
    fullest = max(range(len(stages)), key=lambda stage: stages[stage].total_bytes)
    stage, steps = stages[fullest], microbatches(config, world_size)
    layout = (
        f"{world_size} = tensor {p.tensor_model_parallel_size} x pipeline {p.pipeline_model_parallel_size} "
        f"x data {data_parallel_size(config, world_size)}{', sequence parallel' if p.sequence_parallel else ''}"
    )
    batch, iterations = config.data.global_batch_size, config.training.train_iters
    samples = batch * iterations
    bubble = (p.pipeline_model_parallel_size - 1) / steps
    rows = (
        ("model", _model(config)),
        ("ranks", layout),
        (
            "parameters",
            f"{_short(model_parameters(config))}; {_short(stage.parameters)} on a rank of stage {fullest}",
        ),
        ("layers", f"{' + '.join(str(len(s.layers)) for s in stages)} ({p.pipeline_schedule})"),
        (
            "global batch",
            f"{batch} sequences of {m.seq_length} tokens, {config.data.micro_batch_size} a microbatch",
        ),
        (
            "microbatches",
            f"{steps} for each data-parallel rank; pipeline bubble {bubble:.1%} of the ideal time",
        ),
        (
            "length",
            f"{iterations} iterations, {samples} sequences, {_short(samples * m.seq_length)} tokens",
        ),
        (
            "memory",
            f"roughly {_short(stage.total_bytes)}B on a rank of stage {fullest}, the fullest: "
            f"{_short(stage.state_bytes)}B of weights and optimizer, {_short(stage.activation_bytes)}B of activations",
        ),
    )
    return "\n".join(
        ["The configuration is sound. Nothing was started.", *(f"  {a:14}{b}" for a, b in rows)]
    )


def _model(config: RunConfig) -> str:
    """What kind of model it is."""
    m = config.model
    shape = f"{m.num_layers} layers, hidden {m.hidden_size}, {m.num_attention_heads} heads, vocabulary {m.vocab_size}"
    if not config.is_bert:
        return f"GPT, {shape}"
    pair = f"pairs {config.bert.bert_pair}"
    return f"BERT, {shape}; {m.norm_placement}-norm, {pair}, {config.bert.mask_prob:.0%} of the tokens masked"


def _short(number: float) -> str:
    """Three digits and a decimal prefix: 1.34 G."""
    for unit in ("", " k", " M", " G"):
        if number < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g} T"
