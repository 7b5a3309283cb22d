"""Word, position and token-type embeddings; the word embedding is split over tensor-parallel ranks
by vocabulary.

Shapes: s sequence, b microbatch, h hidden, v vocabulary, t tensor-parallel size.
"""

import torch
from torch import nn

from megalite.nn.parameter import HALF_PRECISIONS
from megalite.nn.settings import LayerSettings
from megalite.nn.weight_gradient import weight_gradient
from megalite.parallel.boxes import Box
from megalite.parallel.collectives import reduce_from_tensor_region, reduce_scatter_sequence


def _rows_held(settings: LayerSettings) -> tuple[int, int, int]:
    """Of this rank's part of the vocabulary: rows in memory, first entry, entries without
    padding."""
    model = settings.model
    tensor = settings.tensor
    rows = model.padded_vocabulary(tensor.size) // tensor.size
    start = min(rows * tensor.rank, model.vocab_size)
    return rows, start, min(rows, model.vocab_size - start)


def vocabulary_bias(settings: LayerSettings) -> nn.Parameter:
    """This rank's entries [v_padded / t] of a bias [v] of the output layer."""
    rows, start, entries = _rows_held(settings)
    return settings.sharded(
        (settings.model.vocab_size,),
        Box((start,), (entries,)),
        "zeros",
        local_shape=(rows,),
        weight_decay=False,
    )


class VocabParallelWeight(nn.Module):
    """A [v, h] weight split by rows: of the word embedding, of its tied copy, or of an output
    layer.

    `weight` is [v_padded / t, h]; its box leaves the padding out, and may be empty. tied: first and
    last stage hold it.
    """

    def __init__(self, settings: LayerSettings, tied: bool = False):
        super().__init__()
        model = settings.model
        rows, start, entries = _rows_held(settings)
        self.weight = settings.sharded(
            (model.vocab_size, model.hidden_size),
            Box((start, 0), (entries, model.hidden_size)),
            "normal",
            std=model.init_method_std,
            local_shape=(rows, model.hidden_size),
            tied=tied,
        )


class _Lookup(torch.autograd.Function):
    """Rows of a weight [v, h] by ids. Its gradient is summed in fp32 at least: torch's own sums
    bf16 in bf16 on the CPU, where a frequent token's gradient stops growing."""

    @staticmethod
    def forward(ctx, ids, weight):
        ctx.save_for_backward(ids)
        ctx.weight = weight
        return nn.functional.embedding(ids, weight)

    @staticmethod
    def backward(ctx, grad):
        (ids,) = ctx.saved_tensors
        weight = ctx.weight
        dtype = torch.float32 if weight.dtype in HALF_PRECISIONS else weight.dtype

        def product(main: torch.Tensor | None) -> torch.Tensor:
            total = torch.ops.aten.embedding_dense_backward(
                grad.to(dtype), ids, weight.shape[0], -1, False
            )
            return total.to(weight.dtype) if main is None else main.add_(total)

        return None, weight_gradient(weight, product)


class SmallEmbedding(nn.Module):
    """A learned table [rows, h], of positions or token types; every tensor-parallel rank holds all
    of it."""

    def __init__(self, settings: LayerSettings, rows: int):
        super().__init__()
        self.weight = settings.replicated(
            (rows, settings.model.hidden_size),
            "normal",
            settings.model.init_method_std,
            on_part=True,
        )


class Embedding(nn.Module):
    """Token ids [b, s] -> hidden states [s, b, h], or this rank's part [s/t, b, h] under sequence
    parallelism.

    Args:
        settings: what all layers share.
        token_types: number of token types; 0: no table for them.
    """

    def __init__(self, settings: LayerSettings, token_types: int = 0):
        super().__init__()
        model = settings.model
        self.group = settings.tensor
        self.sequence_parallel = settings.sequence_parallel
        self.word_embeddings = VocabParallelWeight(settings, tied=model.tied)
        self.position_embeddings = None
        self.token_type_embeddings = None
        if model.position_embedding_type == "learned_absolute":
            self.position_embeddings = SmallEmbedding(settings, model.positions)
        if token_types:
            self.token_type_embeddings = SmallEmbedding(settings, token_types)

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor | None = None,
        token_types: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The sum of the embeddings of tokens [b, s].

        positions: [b, s] rows of the learned table; None: 0 to s - 1. token_types: [b, s] rows of
        the other table;
        None: all of type 0.
        """
        tokens = tokens.t()
        length = tokens.shape[0]
        x = self._words(tokens)
        # The tables are looked up for this rank's part of the sequence only.
        start = x.shape[0] * self.group.rank if self.sequence_parallel else 0
        here = slice(start, start + x.shape[0])
        if self.token_type_embeddings is not None:
            types = torch.zeros_like(tokens) if token_types is None else token_types.t()
            x = x + _Lookup.apply(types[here], self.token_type_embeddings.weight)
        if self.position_embeddings is not None:
            table = self.position_embeddings.weight
            if positions is None:
                x = x + table[:length][here].unsqueeze(1)
            else:
                x = x + _Lookup.apply(positions.t()[here], table)
        return x

    def _words(self, tokens: torch.Tensor) -> torch.Tensor:
        """Word embeddings of tokens [s, b], summed over ranks: an id that another rank holds gives
        zeros here."""
        weight = self.word_embeddings.weight
        if self.group.size == 1:
            return _Lookup.apply(tokens, weight)
        box = weight.spec.box
        local = tokens - box.offset[0]
        elsewhere = (local < 0) | (local >= box.shape[0])
        x = _Lookup.apply(local.masked_fill(elsewhere, 0), weight)
        x = x.masked_fill(elsewhere.unsqueeze(-1), 0.0)
        if self.sequence_parallel:
            return reduce_scatter_sequence(x, self.group)
        return reduce_from_tensor_region(x, self.group)
