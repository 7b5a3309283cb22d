"""A GPT and a BERT in plain PyTorch in one process: the numbers that every layout of megalite must
reproduce.

It imports nothing from megalite and uses no fused or clever operation, so that it can be checked by
reading. Parameters are a dict of tensors by megalite's global names, and everything is a pure
function of them, in their dtype (float64 unless you choose otherwise). test_oracle.py compares it
with Hugging Face's GPT-2, Llama, Qwen2 and Qwen3, test_oracle_bert.py with its BERT. What dropout
drops is in oracle_dropout.py.

Letters: r rows (sequences), s tokens in a sequence, h hidden, n heads, g kv groups, q = n / g query
heads in a group, d head size, f ffn size, v vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from tests.oracle_dropout import (
    AFTER_ATTENTION,
    AFTER_MLP,
    ATTENTION_WEIGHTS,
    EMBEDDING,
    Dropout,
    drop,
)

Parameters = dict[str, Tensor]
Batch = tuple[Tensor | None, ...]
"""GPT's: tokens, labels and loss mask; then, where documents in a row are kept apart, positions and
segments. Each [r, s]. BERT's: a `BertBatch`."""


class BertBatch(NamedTuple):
    """A batch of BERT. Masks are 1 where something counts, else 0."""

    tokens: Tensor
    """int64 [r, s], as are the next three."""
    token_types: Tensor
    """0 or 1."""
    segments: Tensor
    """Tokens of a number see each other. Text is 1, padding 0."""
    labels: Tensor
    loss_mask: Tensor
    """[r, s]: 1 where the label is to be predicted."""
    pair_label: Tensor | None = None
    """int64 [r], 0 or 1. Neither this nor its mask is looked at without a pair head."""
    pair_mask: Tensor | None = None
    """[r]."""


class RopeScaling(NamedTuple):
    """Llama 3.1's change of the rotary frequencies."""

    factor: float = 8.0
    low: float = 1.0
    high: float = 4.0
    length: int = 8192


@dataclass(frozen=True)
class Shape:
    """The shape of a model. The defaults are a tiny GPT-2."""

    architecture: str = "gpt"
    """"gpt" or "bert"."""
    layers: int = 2
    hidden: int = 16
    heads: int = 4
    groups: int = 4
    head_size: int = 4
    ffn: int = 64
    vocab: int = 61
    seq: int = 8
    positions: int = 8
    position_embedding_type: str = "learned_absolute"
    """"learned_absolute", "rope" or "none"."""
    rotary_base: float = 10000.0
    rope_scaling: "RopeScaling | None" = None
    normalization: str = "LayerNorm"
    """"LayerNorm" or "RMSNorm"."""
    norm_epsilon: float = 1e-5
    norm_placement: str = "pre"
    """"pre": x + f(norm(x)) and a final norm; "post": norm(x + f(x)) and a norm of the embedding,
    BERT only."""
    swiglu: bool = False
    gelu: str = "tanh"
    """"tanh" or "erf"."""
    bias: bool = True
    qkv_bias: bool = False
    """Biases of queries, keys and values without `bias`."""
    qk_norm: bool = False
    """Whether each head of queries and keys is normalised over d, before it is rotated."""
    tied: bool = True
    pair: bool = False
    """Whether there is a pair head; BERT only."""

    def __post_init__(self):
        if self.architecture == "gpt" and (self.norm_placement == "post" or self.pair):
            raise ValueError("a GPT has norms before its blocks and no pair head")


def parameter_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """The global shape of every parameter by its global name, in the order of the model."""
    h, f, d, g = shape.hidden, shape.ffn, shape.head_size, shape.groups
    bert = shape.architecture == "bert"
    per_group = shape.heads // g + 2  # query heads, then the key head, then the value head
    shapes: dict[str, tuple[int, ...]] = {"embedding.word_embeddings.weight": (shape.vocab, h)}
    if shape.position_embedding_type == "learned_absolute":
        shapes["embedding.position_embeddings.weight"] = (shape.positions, h)
    if bert:
        shapes["embedding.token_type_embeddings.weight"] = (2, h)

    def norm(name: str, size: int = h) -> None:
        shapes[f"{name}.weight"] = (size,)
        if shape.normalization == "LayerNorm":
            shapes[f"{name}.bias"] = (size,)

    def linear(name: str, output: tuple[int, ...], inputs: int) -> None:
        shapes[f"{name}.weight"] = (*output, inputs)
        if has_bias(shape, name):
            shapes[f"{name}.bias"] = output

    if shape.norm_placement == "post":
        norm("embedding_norm")
    for i in range(shape.layers):
        norm(f"layers.{i}.attention_norm")
        linear(f"layers.{i}.attention.qkv", (g, per_group, d), h)
        if shape.qk_norm:
            norm(f"layers.{i}.attention.query_norm", d)
            norm(f"layers.{i}.attention.key_norm", d)
        linear(f"layers.{i}.attention.output", (h,), shape.heads * d)
        norm(f"layers.{i}.mlp_norm")
        linear(f"layers.{i}.mlp.up", (2, f) if shape.swiglu else (f,), h)
        linear(f"layers.{i}.mlp.down", (h,), f)
    if shape.norm_placement == "pre":
        norm("final_norm")
    if bert:
        linear("mlm_head.dense", (h,), h)
        norm("mlm_head.norm")
        if shape.bias:
            shapes["mlm_head.bias"] = (shape.vocab,)
    if not shape.tied:
        shapes["output.weight"] = (shape.vocab, h)
    if shape.pair:
        linear("pooler", (h,), h)
        linear("pair_head", (2,), h)
    return shapes


def has_bias(shape: Shape, name: str) -> bool:
    """Whether the linear layer of this name has a bias."""
    return shape.bias or (shape.qkv_bias and name.endswith("attention.qkv"))


def random_parameters(
    shape: Shape, seed: int = 0, std: float = 0.2, dtype: torch.dtype = torch.float64
) -> Parameters:
    """Normal numbers everywhere, around 1 for the weights of norms: no bias is zero, so that a lost
    one is noticed."""
    generator = torch.Generator().manual_seed(seed)
    parameters = {}
    for name, size in parameter_shapes(shape).items():
        mean = 1.0 if name.endswith("norm.weight") else 0.0
        parameters[name] = mean + std * torch.randn(size, generator=generator, dtype=dtype)
    return parameters


def documents(tokens: Tensor, end: int) -> tuple[Tensor, Tensor]:
    """Position of each token of [r, s] in its document, and the number of its document in the row,
    token by token. The token `end` is a document's last."""
    positions, segments = torch.zeros_like(tokens), torch.zeros_like(tokens)
    for row in range(tokens.shape[0]):
        position = segment = 0
        for i in range(tokens.shape[1]):
            positions[row, i], segments[row, i] = position, segment
            position += 1
            if tokens[row, i] == end:
                position, segment = 0, segment + 1
    return positions, segments


def logits(
    params: Parameters,
    shape: Shape,
    tokens: Tensor,
    positions: Tensor | None = None,
    segments: Tensor | None = None,
    dropout: Dropout | None = None,
) -> Tensor:
    """A GPT's scores of the next token [r, s, v] for tokens [r, s]. A token is at its place in
    `positions`, unset: in its row; it sees those before it with its number in `segments`, unset:
    all of them."""
    if segments is None:
        segments = torch.zeros_like(tokens)
    sees = (segments[:, :, None] == segments[:, None, :]).tril()
    x = embed(params, shape, tokens, positions=positions, dropout=dropout)
    x = transform(params, shape, x, sees, positions, dropout)
    return x @ output_weight(params, shape).T


def bert_logits(
    params: Parameters,
    shape: Shape,
    tokens: Tensor,
    token_types: Tensor,
    segments: Tensor,
    dropout: Dropout | None = None,
) -> tuple[Tensor, Tensor | None]:
    """A BERT's scores of the token at each place [r, s, v] and of the pair's labels [r, 2] (None
    without a pair head) for tokens, token types and segments [r, s]. A token sees those of its
    segment, on both sides."""
    sees = segments[:, :, None] == segments[:, None, :]
    x = embed(params, shape, tokens, token_types, dropout=dropout)
    x = transform(params, shape, x, sees, dropout=dropout)
    y = norm(
        params, "mlm_head.norm", shape, gelu(shape, linear(params, "mlm_head.dense", shape, x))
    )
    scores = y @ output_weight(params, shape).T
    if shape.bias:
        scores = scores + params["mlm_head.bias"]
    if not shape.pair:
        return scores, None
    pooled = torch.tanh(linear(params, "pooler", shape, x[:, 0]))
    return scores, linear(params, "pair_head", shape, pooled)


def embed(
    params: Parameters,
    shape: Shape,
    tokens: Tensor,
    token_types: Tensor | None = None,
    positions: Tensor | None = None,
    dropout: Dropout | None = None,
) -> Tensor:
    """What goes into the first layer [r, s, h]; everything given is [r, s]. Unset positions count
    along the row."""
    x = params["embedding.word_embeddings.weight"][tokens]
    if shape.position_embedding_type == "learned_absolute":
        positions = along_the_row(tokens) if positions is None else positions
        x = x + params["embedding.position_embeddings.weight"][positions]
    if token_types is not None:
        x = x + params["embedding.token_type_embeddings.weight"][token_types]
    if shape.norm_placement == "post":
        x = norm(params, "embedding_norm", shape, x)
    return drop(x, dropout, 0, EMBEDDING)


def along_the_row(x: Tensor) -> Tensor:
    """0, 1, ... along each row of x [r, s, ...]: [r, s]."""
    return torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])


def transform(
    params: Parameters,
    shape: Shape,
    x: Tensor,
    sees: Tensor,
    positions: Tensor | None = None,
    dropout: Dropout | None = None,
) -> Tensor:
    """All layers of x [r, s, h], and the final norm if there is one. `sees` [r, j, k]: whether
    token j looks at token k. Unset `positions` [r, s] count along the row."""
    positions = along_the_row(x) if positions is None else positions
    for i in range(shape.layers):
        x = layer(params, i, shape, x, sees, positions, dropout)
    return norm(params, "final_norm", shape, x) if shape.norm_placement == "pre" else x


def layer(
    params: Parameters,
    i: int,
    shape: Shape,
    x: Tensor,
    sees: Tensor,
    positions: Tensor,
    dropout: Dropout | None,
) -> Tensor:
    """Layer i of x [r, s, h]."""

    def attend(x: Tensor) -> Tensor:
        return drop(
            attention(params, i, shape, x, sees, positions, dropout), dropout, i, AFTER_ATTENTION
        )

    def feed(x: Tensor) -> Tensor:
        return drop(mlp(params, f"layers.{i}.mlp", shape, x), dropout, i, AFTER_MLP)

    if shape.norm_placement == "pre":
        x = x + attend(norm(params, f"layers.{i}.attention_norm", shape, x))
        return x + feed(norm(params, f"layers.{i}.mlp_norm", shape, x))
    x = norm(params, f"layers.{i}.attention_norm", shape, x + attend(x))
    return norm(params, f"layers.{i}.mlp_norm", shape, x + feed(x))


def output_weight(params: Parameters, shape: Shape) -> Tensor:
    """The weight [v, h] that gives every token of the vocabulary its score."""
    return params["embedding.word_embeddings.weight" if shape.tied else "output.weight"]


def norm(params: Parameters, name: str, shape: Shape, x: Tensor) -> Tensor:
    """LayerNorm or RMSNorm over the last dim of x."""
    if shape.normalization == "LayerNorm":
        x = x - x.mean(-1, keepdim=True)
    x = (
        x
        / torch.sqrt((x * x).mean(-1, keepdim=True) + shape.norm_epsilon)
        * params[f"{name}.weight"]
    )
    return x + params[f"{name}.bias"] if shape.normalization == "LayerNorm" else x


def linear(params: Parameters, name: str, shape: Shape, x: Tensor) -> Tensor:
    """x [..., inputs] times the weight [*outputs, inputs], plus the bias [*outputs]: [...,
    *outputs]."""
    y = torch.tensordot(x, params[f"{name}.weight"], dims=([-1], [-1]))
    return y + params[f"{name}.bias"] if has_bias(shape, name) else y


def attention(
    params: Parameters,
    i: int,
    shape: Shape,
    x: Tensor,
    sees: Tensor,
    positions: Tensor,
    dropout: Dropout | None,
) -> Tensor:
    """Layer i's self-attention of x [r, s, h]: token j looks at token k where `sees` [r, j, k];
    each key/value head serves the q query heads of its group. `positions` are [r, s]."""
    rows, s, _ = x.shape
    qkv = linear(params, f"layers.{i}.attention.qkv", shape, x)  # [r, s, g, q+2, d]
    query, key, value = qkv[..., :-2, :], qkv[..., -2, :], qkv[..., -1, :]
    if shape.qk_norm:
        query = norm(params, f"layers.{i}.attention.query_norm", shape, query)
        key = norm(params, f"layers.{i}.attention.key_norm", shape, key)
    if shape.position_embedding_type == "rope":
        query, key = rotate(query, shape, positions), rotate(key, shape, positions)
    scores = torch.einsum("rjgqd,rkgd->rgqjk", query, key) / sqrt(shape.head_size)
    weights = softmax(scores.masked_fill(~sees[:, None, None], -torch.inf))
    by_head = weights.reshape(rows, shape.heads * s, s)  # row head * s + j, column k
    weights = drop(by_head, dropout, i, ATTENTION_WEIGHTS).reshape(weights.shape)
    context = torch.einsum("rgqjk,rkgd->rjgqd", weights, value).reshape(
        rows, s, shape.heads * shape.head_size
    )
    return linear(params, f"layers.{i}.attention.output", shape, context)


def scaled(frequency: float, scaling: RopeScaling) -> float:
    """A rotary frequency by Llama 3.1's rule: wavelengths below length / high stay, those above
    length / low become `factor` times longer, and between them the change goes from none to all in
    proportion to length / wavelength."""
    wavelength = 2 * torch.pi / frequency
    if wavelength < scaling.length / scaling.high:
        return frequency
    if wavelength > scaling.length / scaling.low:
        return frequency / scaling.factor
    smooth = (scaling.length / wavelength - scaling.low) / (scaling.high - scaling.low)
    return (1 - smooth) * frequency / scaling.factor + smooth * frequency


def rotate(x: Tensor, shape: Shape, positions: Tensor) -> Tensor:
    """Rotary embedding of x [r, s, ..., d]: the plane of components i and i + d/2 turns by position
    * base^(-2i/d), or what scaling makes of that."""
    d = x.shape[-1]
    frequencies = shape.rotary_base ** (-torch.arange(0, d, 2, dtype=x.dtype, device=x.device) / d)
    if shape.rope_scaling:
        each = [scaled(frequency, shape.rope_scaling) for frequency in frequencies.tolist()]
        frequencies = torch.tensor(each, dtype=x.dtype, device=x.device)
    angles = positions.to(x.dtype)[:, :, None] * frequencies
    angles = angles.reshape(*positions.shape, *[1] * (x.dim() - 3), d // 2)
    cos, sin = angles.cos(), angles.sin()
    first, second = x[..., : d // 2], x[..., d // 2 :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def softmax(x: Tensor) -> Tensor:
    """exp(x) / sum(exp(x)) over the last dim; the largest entry is taken off first, so that nothing
    overflows."""
    e = torch.exp(x - x.amax(-1, keepdim=True).detach())
    return e / e.sum(-1, keepdim=True)


def mlp(params: Parameters, name: str, shape: Shape, x: Tensor) -> Tensor:
    """SwiGLU or GELU MLP of x [r, s, h]."""
    y = linear(params, f"{name}.up", shape, x)
    if shape.swiglu:
        gate, up = y[..., 0, :], y[..., 1, :]
        y = gate / (1 + torch.exp(-gate)) * up
    else:
        y = gelu(shape, y)
    return linear(params, f"{name}.down", shape, y)


def gelu(shape: Shape, x: Tensor) -> Tensor:
    """x times the normal distribution's probability of less than x: exactly, or by tanh."""
    if shape.gelu == "erf":
        return 0.5 * x * (1 + torch.erf(x / sqrt(2)))
    return 0.5 * x * (1 + torch.tanh(sqrt(2 / torch.pi) * (x + 0.044715 * x**3)))


def loss(
    params: Parameters, shape: Shape, *batch: Tensor | None, dropout: Dropout | None = None
) -> Tensor:
    """The loss of a batch, see `Batch`. GPT: the mean cross entropy over all unmasked tokens of all
    rows given. BERT: the sum of its two terms."""
    if shape.architecture == "bert":
        return sum(bert_terms(params, shape, *batch, dropout=dropout))
    tokens, labels, loss_mask, *places = batch
    return mean_cross_entropy(
        logits(params, shape, tokens, *places, dropout=dropout), labels, loss_mask
    )


def bert_terms(
    params: Parameters, shape: Shape, *batch: Tensor | None, dropout: Dropout | None = None
) -> tuple[Tensor, Tensor]:
    """Both terms of a BERT's loss: the mean cross entropy over all masked tokens, and over all
    pairs, of all rows given. A term that counts nothing is 0."""
    b = BertBatch(*batch)
    scores, pair_scores = bert_logits(params, shape, b.tokens, b.token_types, b.segments, dropout)
    tokens = mean_cross_entropy(scores, b.labels, b.loss_mask)
    pairs = (
        mean_cross_entropy(pair_scores, b.pair_label, b.pair_mask)
        if shape.pair
        else torch.zeros_like(tokens)
    )
    return tokens, pairs


def mean_cross_entropy(scores: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Mean of -log softmax(scores)[label] where the mask is 1, not 0; 0 where it is nowhere. Scores
    [..., v], the others [...]."""
    shifted = scores - scores.amax(-1, keepdim=True).detach()
    log_probability = shifted - shifted.exp().sum(-1, keepdim=True).log()
    losses = -log_probability.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    mask = mask.to(losses.dtype)
    return (losses * mask).sum() / mask.sum().clamp(min=1)


def loss_and_gradients(
    params: Parameters, shape: Shape, *batch: Tensor | None, dropout: Dropout | None = None
) -> tuple[float, Parameters]:
    """The loss, and its gradient with respect to every parameter by name. `params` are left as they
    are."""
    leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
    value = loss(leaves, shape, *batch, dropout=dropout)
    gradients = torch.autograd.grad(value, list(leaves.values()))
    return value.item(), dict(zip(leaves, gradients, strict=True))


@dataclass(frozen=True)
class LoadedModel:
    """What `train` ends with."""

    params: Parameters
    losses: list[float]
    """Loss of each step, before its update."""
    grad_norms: list[float]
    """Global norm of each step's gradient, before clipping."""


def train(
    params: Parameters,
    shape: Shape,
    batches: Sequence[Batch],
    lr: float | Sequence[float],
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    epsilon: float = 1e-8,
    weight_decay: float = 0.01,
    max_norm: float = 0.0,
    steps: int | None = None,
    dropout: Dropout | None = None,
) -> LoadedModel:
    """AdamW as in Loshchilov and Hutter's algorithm 2, the decay multiplied by the learning rate as
    well.

    `lr` is one number or one for each step; `max_norm` of 0 does not clip; `steps` (default: one
    per batch) goes round the batches again when there are fewer. Biases and norms do not decay.
    Unless `dropout` has sample numbers [steps, r], samples are counted on from step to step, also
    when a batch comes again.
    """
    steps = len(batches) if steps is None else steps
    rates = [lr] * steps if isinstance(lr, (int, float)) else lr
    params = dict(params)
    first = {name: torch.zeros_like(value) for name, value in params.items()}
    second = {name: torch.zeros_like(value) for name, value in params.items()}
    losses, grad_norms = [], []
    for step in range(1, steps + 1):
        batch = batches[(step - 1) % len(batches)]
        dropped = dropout and replace(
            dropout, samples=samples_of_step(dropout, step - 1, len(batch[0]))
        )
        value, gradients = loss_and_gradients(params, shape, *batch, dropout=dropped)
        norm = sqrt(sum((g * g).sum().item() for g in gradients.values()))
        clip = min(1.0, max_norm / (norm + 1e-6)) if max_norm > 0 else 1.0
        losses.append(value)
        grad_norms.append(norm)
        for name, gradient in gradients.items():
            gradient = clip * gradient
            first[name] = betas[0] * first[name] + (1 - betas[0]) * gradient
            second[name] = betas[1] * second[name] + (1 - betas[1]) * gradient * gradient
            mean = first[name] / (1 - betas[0] ** step)
            variance = second[name] / (1 - betas[1] ** step)
            decay = weight_decay * params[name] if decays(name) else 0.0
            params[name] = params[name] - rates[step - 1] * (
                mean / (variance.sqrt() + epsilon) + decay
            )
    return LoadedModel(params, losses, grad_norms)


def samples_of_step(dropout: Dropout, step: int, rows: int) -> Tensor:
    """The sample numbers [r] of a step, counted from 0."""
    return step * rows + torch.arange(rows) if dropout.samples is None else dropout.samples[step]


def decays(name: str) -> bool:
    """Whether weight decay applies to this parameter: not to biases, not to the weights of
    norms."""
    return not name.endswith((".bias", "norm.weight"))
