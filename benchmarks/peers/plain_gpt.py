"""A GPT in plain PyTorch, as one would write it without any parallelism: what megalite is compared
with, and what torch's own kinds of parallelism and DeepSpeed train."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn import functional as F


class Embedding(nn.Module):
    """Words and learned positions."""

    def __init__(self, vocab: int, seq: int, hidden: int, dropout: float):
        super().__init__()
        self.dropout = dropout
        self.words = nn.Embedding(vocab, hidden)
        self.positions = nn.Embedding(seq, hidden)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[b, s] -> [b, s, h]."""
        x = self.words(tokens) + self.positions.weight[: tokens.shape[1]]
        return F.dropout(x, self.dropout)


class Attention(nn.Module):
    """Causal attention with one product for queries, keys and values."""

    def __init__(self, hidden: int, heads: int, dropout: float):
        super().__init__()
        self.head_size = hidden // heads
        self.dropout = dropout
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.output = nn.Linear(hidden, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[b, s, h] -> [b, s, h]. Heads are laid out [n, 3, d], as megalite's qkv weight has them;
        n is the number of heads held here."""
        qkv = self.qkv(x).unflatten(-1, (-1, 3, self.head_size)).permute(3, 0, 2, 1, 4)
        y = F.scaled_dot_product_attention(*qkv, is_causal=True, dropout_p=self.dropout)
        return F.dropout(self.output(y.transpose(1, 2).flatten(2)), self.dropout)


class Block(nn.Module):
    """A layer of GPT-2."""

    def __init__(self, hidden: int, heads: int, dropout: float):
        super().__init__()
        self.dropout = dropout
        self.norm1 = nn.LayerNorm(hidden)
        self.norm2 = nn.LayerNorm(hidden)
        self.attention = Attention(hidden, heads, dropout)
        self.up = nn.Linear(hidden, 4 * hidden)
        self.down = nn.Linear(4 * hidden, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[b, s, h] -> [b, s, h]."""
        x = x + self.attention(self.norm1(x))
        y = self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))
        return x + F.dropout(y, self.dropout)


class Head(nn.Module):
    """The final norm and the output layer, not tied to the embedding."""

    def __init__(self, vocab: int, hidden: int):
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.output = nn.Linear(hidden, vocab, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[b, s, h] -> logits [b, s, v]."""
        return self.output(self.norm(x))


def plain_gpt(shape, blocks: Iterable[int] | None = None, dropout: float = 0.0) -> nn.Sequential:
    """The model, or the pipeline stage with these blocks: the embedding comes with the first block,
    the head with the last.

    Args:
        shape: with layers, hidden, heads, seq and vocab.
        blocks: their indices; None: all.
        dropout: of weights and hidden states.
    """
    blocks = list(range(shape.layers) if blocks is None else blocks)
    model = nn.Sequential()
    if 0 in blocks:
        model.add_module("embedding", Embedding(shape.vocab, shape.seq, shape.hidden, dropout))
    for i in blocks:
        model.add_module(f"block{i}", Block(shape.hidden, shape.heads, dropout))
    if shape.layers - 1 in blocks:
        model.add_module("head", Head(shape.vocab, shape.hidden))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.02)
    return model


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean over labels [b, s] of logits [b, s, v]."""
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())
