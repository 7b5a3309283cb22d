"""What a layer and a head cost: floating-point operations and bytes of activations. Imports no
torch.

Partition, estimate and throughput figures all come from here.

Letters: L layers, s sequence, b microbatch, h hidden, n heads, g query groups, d head size, f ffn
size, v vocabulary, t tensor-parallel size.
"""

from dataclasses import dataclass

from megalite.nn.config import ModelConfig, RecomputeConfig


@dataclass(frozen=True)
class HeadCost:
    """What a model has before and after its layers, beside embedding, final norm and output
    weight."""

    predicted: float = 1.0
    """Share of the tokens that the output layer is computed for."""
    token_types: int = 0
    """Rows of a table of token types."""
    dense: bool = False
    """Whether a dense layer [h, h] with a norm, and a bias [v], come before the loss, as in
    BERT."""
    pair_classes: int = 0
    """Classes of a head for pairs of segments behind a pooler [h, h]; 0: none."""


def layer_weights(model: ModelConfig) -> int:
    """Weights of the matrix products of one layer: query, key and value, attention output, and
    MLP."""
    heads = model.num_attention_heads
    attention = model.hidden_size * model.head_size * (2 * heads + 2 * model.query_groups)
    matrices = 3 if model.swiglu else 2
    return attention + matrices * model.hidden_size * model.ffn


def layer_flops(model: ModelConfig) -> float:
    """FLOPs of the forward of one sequence through one layer: 2 s per weight of a matrix product,
    and 4 s^2 n d for scores and values, counted in full, not halved for the causal mask."""
    return 2 * model.seq_length * layer_weights(model) + _score_flops(model)


def _score_flops(model: ModelConfig) -> float:
    """FLOPs of scores and values in the forward of one sequence through one layer."""
    return 4 * model.seq_length**2 * model.num_attention_heads * model.head_size


def head_flops(model: ModelConfig, head: HeadCost) -> float:
    """FLOPs of the forward of one sequence through what comes after the layers: the output layer,
    with BERT's dense layer, for the share of the tokens that is predicted; BERT's pooler and pair
    head for one token."""
    h = model.hidden_size
    columns = model.vocab_size
    if head.dense:
        columns += h
    flops = 2 * head.predicted * model.seq_length * columns * h
    if head.pair_classes:
        flops += 2 * h * (h + head.pair_classes)
    return flops


def flops_per_sequence(model: ModelConfig, head: HeadCost | None = None) -> float:
    """Model FLOPs of one training sequence, forward and backward (3 times the forward;
    recomputation not counted): Narayanan et al. 2021, appendix, in its general form."""
    layers = model.num_layers * layer_flops(model)
    return 3.0 * (layers + head_flops(model, head or HeadCost()))


def pass_flops(
    model: ModelConfig, head: HeadCost, recompute: RecomputeConfig, *, layers: int, is_last: bool
) -> dict[str, float]:
    """FLOPs of one sequence on a stage of `layers` layers, by what a pipeline schedule runs apart:
    F, the forward; I, the gradient of the stage's input; W, the gradients of its weights.

    A matrix product with weights takes as much in each of the three. Scores and values have no
    weights, and twice their forward in I. What is recomputed runs again in I: of layers all of it,
    or with selective recomputation their scores and values; of the head, which the last stage has,
    nothing. Embedding, norms and loss do no matrix products and are left out.
    """
    scores = layers * _score_flops(model)
    layer = layers * layer_flops(model)
    output = head_flops(model, head) if is_last else 0.0
    again = 0.0
    if recompute.granularity == "full":
        again = layer
        if recompute.recompute_method == "block":
            again *= min(layers, recompute.recompute_num_layers) / layers
    elif recompute.granularity == "selective":
        again = scores
    forward = layer + output
    return {"F": forward, "I": forward + scores + again, "W": forward - scores}


def stage_flops(
    model: ModelConfig, head: HeadCost, recompute: RecomputeConfig, *, layers: int, is_last: bool
) -> float:
    """FLOPs of the forward and backward of one sequence on a stage, as `pass_flops`."""
    return sum(pass_flops(model, head, recompute, layers=layers, is_last=is_last).values())


def activation_bytes(
    model: ModelConfig,
    recompute: RecomputeConfig,
    *,
    micro_batch_size: int,
    element_bytes: int,
    layers: int,
    in_flight: int,
    tensor: int,
    sequence_parallel: bool,
) -> float:
    """Bytes of activations that `layers` layers of one rank keep for `in_flight` microbatches.

    After Korthikanti et al. 2022, section 4, in units of s b h, with 2 bytes an element and 1 of a
    dropout mask. A layer keeps 34 + 5 n s / h (their equation 1):

        norms       4 = two inputs
        attention  11 = input of qkv 2, query 2, key 2, value 2, input of the output projection 2,
                        dropout mask 1
        MLP        19 = input 2, input of GELU 8, input of the down projection 8, dropout mask 1
        scores      5 n s / h = output of the softmax 2, its dropout mask 1, what dropout gives 2

    Norms of queries and keys keep their inputs, 4 more that are divided over the ranks.
    """
    grain = recompute.granularity
    # s b h, scaled from the formulas' 2 bytes an element.
    unit = model.seq_length * micro_batch_size * model.hidden_size * element_bytes / 2
    # Tensors [b, n, s, s]. Selective recomputation keeps none of them (equation 6).
    scores = 0.0
    if model.attention_dropout > 0 and grain != "selective":
        scores = 5 * model.num_attention_heads * model.seq_length / model.hidden_size
    shared = 24 + scores
    if model.qk_layernorm:
        shared += 4
    # Tensor parallelism alone leaves 10 of the 34 whole on every rank: inputs of norms 4, of qkv
    # and MLP 4, dropout masks 2 (equation 2). Sequence parallelism divides all (equation 4).
    layer = (10 + shared) / tensor if sequence_parallel else 10 + shared / tensor
    if grain != "full":
        return unit * layer * layers * in_flight
    group = recompute.recompute_num_layers
    # What is kept of a recomputed layer is its input, 2 s b h; one group at a time is computed
    # again.
    if recompute.recompute_method == "uniform":
        return unit * (2 * -(-layers // group) * in_flight + layer * group)
    return unit * (in_flight * (2 * group + layer * (layers - group)) + layer)
