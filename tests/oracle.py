"""A GPT in plain PyTorch in one process: the numbers that every layout of megalite must reproduce.

It imports nothing from megalite and uses no fused or clever operation, so that it can be checked by reading. Parameters
are a dict of tensors by megalite's global names, and everything is a pure function of them, in their dtype (float64
unless you choose otherwise). test_oracle.py compares it with Hugging Face's GPT-2 and Llama.

Letters: r rows (sequences), s tokens in a sequence, h hidden, n heads, g kv groups, q = n / g query heads in a group,
d head size, f ffn size, v vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

Parameters = dict[str, Tensor]
Batch = tuple[Tensor | None, ...]
"""tokens, labels and loss mask; then, where documents in a row are kept apart, positions and segments. Each [r, s]."""


@dataclass(frozen=True)
class Shape:
    """The shape of a model. The defaults are a tiny GPT-2."""

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
    normalization: str = "LayerNorm"
    """"LayerNorm" or "RMSNorm"."""
    norm_epsilon: float = 1e-5
    swiglu: bool = False
    bias: bool = True
    tied: bool = True


def parameter_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """The global shape of every parameter by its global name, in the order of the model."""
    h, f, d, g = shape.hidden, shape.ffn, shape.head_size, shape.groups
    per_group = shape.heads // g + 2  # query heads, then the key head, then the value head
    shapes: dict[str, tuple[int, ...]] = {"embedding.word_embeddings.weight": (shape.vocab, h)}
    if shape.position_embedding_type == "learned_absolute":
        shapes["embedding.position_embeddings.weight"] = (shape.positions, h)

    def norm(name: str) -> None:
        shapes[f"{name}.weight"] = (h,)
        if shape.normalization == "LayerNorm":
            shapes[f"{name}.bias"] = (h,)

    def linear(name: str, output: tuple[int, ...], inputs: int) -> None:
        shapes[f"{name}.weight"] = (*output, inputs)
        if shape.bias:
            shapes[f"{name}.bias"] = output

    for i in range(shape.layers):
        norm(f"layers.{i}.attention_norm")
        linear(f"layers.{i}.attention.qkv", (g, per_group, d), h)
        linear(f"layers.{i}.attention.output", (h,), shape.heads * d)
        norm(f"layers.{i}.mlp_norm")
        linear(f"layers.{i}.mlp.up", (2, f) if shape.swiglu else (f,), h)
        linear(f"layers.{i}.mlp.down", (h,), f)
    norm("final_norm")
    if not shape.tied:
        shapes["output.weight"] = (shape.vocab, h)
    return shapes


def random_parameters(shape: Shape, seed: int = 0, std: float = 0.2, dtype: torch.dtype = torch.float64) -> Parameters:
    """Normal numbers everywhere, around 1 for the weights of norms: no bias is zero, so that a lost one is noticed."""
    generator = torch.Generator().manual_seed(seed)
    parameters = {}
    for name, size in parameter_shapes(shape).items():
        mean = 1.0 if name.endswith("norm.weight") else 0.0
        parameters[name] = mean + std * torch.randn(size, generator=generator, dtype=dtype)
    return parameters


def documents(tokens: Tensor, end: int) -> tuple[Tensor, Tensor]:
    """Position of each token of [r, s] in its document, and the number of its document in the row, token by token. The
    token `end` is a document's last."""
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
    params: Parameters, shape: Shape, tokens: Tensor, positions: Tensor | None = None, segments: Tensor | None = None
) -> Tensor:
    """Scores of the next token [r, s, v] for tokens [r, s]. A token is at its place in `positions`, unset: in its row;
    it sees those before it with its number in `segments`, unset: all of them."""
    if positions is None:
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
    if segments is None:
        segments = torch.zeros_like(tokens)
    word_embeddings = params["embedding.word_embeddings.weight"]
    x = word_embeddings[tokens]
    if shape.position_embedding_type == "learned_absolute":
        x = x + params["embedding.position_embeddings.weight"][positions]
    for i in range(shape.layers):
        name = f"layers.{i}.attention"
        x = x + attention(params, name, shape, norm(params, f"{name}_norm", shape, x), positions, segments)
        x = x + mlp(params, f"layers.{i}.mlp", shape, norm(params, f"layers.{i}.mlp_norm", shape, x))
    x = norm(params, "final_norm", shape, x)
    return x @ (word_embeddings if shape.tied else params["output.weight"]).T


def norm(params: Parameters, name: str, shape: Shape, x: Tensor) -> Tensor:
    """LayerNorm or RMSNorm over h of x [r, s, h]."""
    if shape.normalization == "LayerNorm":
        x = x - x.mean(-1, keepdim=True)
    x = x / torch.sqrt((x * x).mean(-1, keepdim=True) + shape.norm_epsilon) * params[f"{name}.weight"]
    return x + params[f"{name}.bias"] if shape.normalization == "LayerNorm" else x


def linear(params: Parameters, name: str, shape: Shape, x: Tensor) -> Tensor:
    """x [..., inputs] times the weight [*outputs, inputs], plus the bias [*outputs]: [..., *outputs]."""
    y = torch.tensordot(x, params[f"{name}.weight"], dims=([-1], [-1]))
    return y + params[f"{name}.bias"] if shape.bias else y


def attention(params: Parameters, name: str, shape: Shape, x: Tensor, positions: Tensor, segments: Tensor) -> Tensor:
    """Causal self-attention of x [r, s, h]; each key/value head serves the q query heads of its group."""
    rows, s, _ = x.shape
    qkv = linear(params, f"{name}.qkv", shape, x)  # [r, s, g, q+2, d]
    query, key, value = qkv[..., :-2, :], qkv[..., -2, :], qkv[..., -1, :]
    if shape.position_embedding_type == "rope":
        query, key = rotate(query, shape.rotary_base, positions), rotate(key, shape.rotary_base, positions)
    scores = torch.einsum("rigqd,rjgd->rgqij", query, key) / sqrt(shape.head_size)
    future = torch.ones(s, s, dtype=torch.bool, device=x.device).triu(diagonal=1)
    elsewhere = segments[:, :, None] != segments[:, None, :]
    weights = softmax(scores.masked_fill((future | elsewhere)[:, None, None], -torch.inf))
    context = torch.einsum("rgqij,rjgd->rigqd", weights, value).reshape(rows, s, shape.heads * shape.head_size)
    return linear(params, f"{name}.output", shape, context)


def rotate(x: Tensor, base: float, positions: Tensor) -> Tensor:
    """Rotary embedding of x [r, s, ..., d]: the plane of components i and i + d/2 turns by position * base^(-2i/d)."""
    d = x.shape[-1]
    frequencies = base ** (-torch.arange(0, d, 2, dtype=x.dtype, device=x.device) / d)
    angles = positions.to(x.dtype)[:, :, None] * frequencies
    angles = angles.reshape(*positions.shape, *[1] * (x.dim() - 3), d // 2)
    cos, sin = angles.cos(), angles.sin()
    first, second = x[..., : d // 2], x[..., d // 2 :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def softmax(x: Tensor) -> Tensor:
    """exp(x) / sum(exp(x)) over the last dim; the largest entry is taken off first, so that nothing overflows."""
    e = torch.exp(x - x.amax(-1, keepdim=True).detach())
    return e / e.sum(-1, keepdim=True)


def mlp(params: Parameters, name: str, shape: Shape, x: Tensor) -> Tensor:
    """SwiGLU or tanh-GELU MLP of x [r, s, h]."""
    y = linear(params, f"{name}.up", shape, x)
    if shape.swiglu:
        gate, up = y[..., 0, :], y[..., 1, :]
        y = gate / (1 + torch.exp(-gate)) * up
    else:
        y = 0.5 * y * (1 + torch.tanh(sqrt(2 / torch.pi) * (y + 0.044715 * y**3)))
    return linear(params, f"{name}.down", shape, y)


def loss(
    params: Parameters,
    shape: Shape,
    tokens: Tensor,
    labels: Tensor,
    loss_mask: Tensor,
    positions: Tensor | None = None,
    segments: Tensor | None = None,
) -> Tensor:
    """Mean cross entropy over all unmasked tokens of all rows given. Each tensor is [r, s]; a mask of 0 leaves out."""
    scores = logits(params, shape, tokens, positions, segments)
    shifted = scores - scores.amax(-1, keepdim=True).detach()
    log_probability = shifted - shifted.exp().sum(-1, keepdim=True).log()
    losses = -log_probability.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    mask = loss_mask.to(losses.dtype)
    return (losses * mask).sum() / mask.sum()


def loss_and_gradients(params: Parameters, shape: Shape, *batch: Tensor | None) -> tuple[float, Parameters]:
    """The loss, and its gradient with respect to every parameter by name. `params` are left as they are."""
    leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
    value = loss(leaves, shape, *batch)
    gradients = torch.autograd.grad(value, list(leaves.values()))
    return value.item(), dict(zip(leaves, gradients, strict=True))


@dataclass(frozen=True)
class Trained:
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
) -> Trained:
    """AdamW as in Loshchilov and Hutter's algorithm 2, the decay multiplied by the learning rate as well.

    `lr` is one number or one for each step; `max_norm` of 0 does not clip; `steps` (default: one per batch) goes round
    the batches again when there are fewer. Biases and norms do not decay.
    """
    steps = len(batches) if steps is None else steps
    rates = [lr] * steps if isinstance(lr, (int, float)) else lr
    params = dict(params)
    first = {name: torch.zeros_like(value) for name, value in params.items()}
    second = {name: torch.zeros_like(value) for name, value in params.items()}
    losses, grad_norms = [], []
    for step in range(1, steps + 1):
        value, gradients = loss_and_gradients(params, shape, *batches[(step - 1) % len(batches)])
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
            params[name] = params[name] - rates[step - 1] * (mean / (variance.sqrt() + epsilon) + decay)
    return Trained(params, losses, grad_norms)


def decays(name: str) -> bool:
    """Whether weight decay applies to this parameter: not to biases, not to the weights of norms."""
    return not name.endswith((".bias", "norm.weight"))
