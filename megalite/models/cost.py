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


def output_cost(model: ModelConfig, predicted: float = 1.0) -> float:
    """Work of the output layer in units of one transformer layer: their ratio of weights.

    predicted: share of the tokens that it is computed for.
    """
    return predicted * model.vocab_size * model.hidden_size / layer_weights(model)


def flops_per_sequence(model: ModelConfig, head: HeadCost | None = None) -> float:
    """Model FLOPs of one training sequence, forward and backward (3 times the forward;
    recomputation not counted).

    A forward takes 2 s per weight of a matrix product, output layer included, and 4 L s^2 n d for
    scores and values, counted in full, not halved for the causal mask (Narayanan et al. 2021,
    appendix, in its general form). BERT's pooler is left out.
    """
    head = head or HeadCost()
    s = model.seq_length
    output = model.vocab_size + (model.hidden_size if head.dense else 0)
    weights = model.num_layers * layer_weights(model) + head.predicted * output * model.hidden_size
    scores = 4 * model.num_layers * s**2 * model.num_attention_heads * model.head_size
    return 3.0 * (2 * s * weights + scores)


def pass_flops(
    model: ModelConfig, head: HeadCost, recompute: RecomputeConfig, *, layers: int, is_last: bool
) -> dict[str, float]:
    """FLOPs of one sequence on a stage of `layers` layers, by what a pipeline schedule runs apart:
    F, the forward; I, the gradient of the stage's input; W, the gradients of its weights.

    A matrix product with weights takes as much in each of the three. Scores and values have no
    weights, and twice their forward in I. What is recomputed runs again in I. The last stage also
    has the output layer. Embedding, norms and loss are left out.
    """
    tokens = 2 * model.seq_length
    products = layers * tokens * layer_weights(model)
    heads = model.num_attention_heads
    scores = 2 * layers * tokens * model.seq_length * heads * model.head_size
    output = 0.0
    if is_last:
        columns = model.vocab_size + (model.hidden_size if head.dense else 0)
        output = head.predicted * tokens * columns * model.hidden_size
    again = 0.0
    if recompute.granularity == "full":
        again = products + scores
        if recompute.recompute_method == "block":
            again *= min(layers, recompute.recompute_num_layers) / layers
    elif recompute.granularity == "selective":
        again = scores
    forward = products + scores + output
    return {"F": forward, "I": forward + scores + again, "W": products + output}


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
