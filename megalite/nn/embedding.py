"""Word, position and token-type embeddings; the word embedding is split over tensor-parallel ranks
by vocabulary.

Shapes: s sequence, b microbatch, h hidden, v vocabulary, t tensor-parallel size.
"""

import torch
from torch import Tensor, nn

from megalite.nn.parameter import HALF_PRECISIONS
from megalite.nn.settings import LayerSettings
from megalite.nn.weight_gradient import weight_gradient
from megalite.parallel.boxes import Box
from megalite.parallel.collectives import reduce_from_tensor_region, reduce_scatter_sequence


def vocab_parallel_parameter(
    settings: LayerSettings, init: str, std: float = 0.0, width: tuple[int, ...] = (), tied=False
) -> nn.Parameter:
    """This rank's rows [v_padded / t, *width] of a parameter [v, *width] of the vocabulary.

    Its box leaves the padding out, and may be empty. tied: whether first and last stage hold it.
    """
    v = settings.model.vocab_size
    group = settings.tensor
    rows = settings.model.padded_vocabulary(group.size) // group.size
    start = min(rows * group.rank, v)
    box = Box((start, *[0] * len(width)), (min(rows, v - start), *width))
    return settings.parameter((v, *width), init, std, box=box, rows=rows, tied=tied)


class VocabParallelWeight(nn.Module):
    """A [v, h] weight split by rows: of the word embedding, of its tied copy, or of an output
    layer."""

    def __init__(self, settings: LayerSettings, tied: bool = False):
        super().__init__()
        width = (settings.model.hidden_size,)
        std = settings.model.init_method_std
        self.weight = vocab_parallel_parameter(settings, "normal", std, width=width, tied=tied)


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

        def product(main: Tensor | None) -> Tensor:
            # [v, h], mostly zeros: no row is scaled by its frequency, and no id is padding.
            rows = weight.shape[0]
            total = torch.ops.aten.embedding_dense_backward(grad.to(dtype), ids, rows, -1, False)
            return total.to(weight.dtype) if main is None else main.add_(total)

        return None, weight_gradient(weight, product)


class SmallEmbedding(nn.Module):
    """A learned table [rows, h], of positions or token types; every tensor-parallel rank holds all
    of it."""

    def __init__(self, settings: LayerSettings, rows: int):
        super().__init__()
        shape = (rows, settings.model.hidden_size)
        std = settings.model.init_method_std
        self.weight = settings.parameter(shape, "normal", std, on_part=True)


class Embedding(nn.Module):
    """Token ids [b, s] -> hidden states [s, b, h], or this rank's shard of them, [s/t, b, h], under
    sequence parallelism.

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
        self, tokens: Tensor, positions: Tensor | None = None, token_types: Tensor | None = None
    ) -> Tensor:
        """The sum of the embeddings of tokens [b, s]: [s, b, h], or [s/t, b, h].

        positions: [b, s] rows of the learned position table; None: 0 to s - 1.
        token_types: [b, s] rows of the token-type table; None: all of type 0.
        """
        tokens = tokens.t()
        x = self._words(tokens)  # [s, b, h] or [s/t, b, h]
        # The tables are looked up for this rank's part of the sequence only.
        start = x.shape[0] * self.group.rank if self.sequence_parallel else 0
        here = slice(start, start + x.shape[0])
        if self.token_type_embeddings is not None:
            types = torch.zeros_like(tokens) if token_types is None else token_types.t()
            x = x + _Lookup.apply(types[here], self.token_type_embeddings.weight)
        if self.position_embeddings is not None:
            table = self.position_embeddings.weight
            if positions is None:
                x = x + table[: len(tokens)][here].unsqueeze(1)
            else:
                x = x + _Lookup.apply(positions.t()[here], table)
        return x

    def _words(self, tokens: Tensor) -> Tensor:
        """Word embeddings of tokens [s, b], summed over ranks: an id that another rank holds gives
        zeros here."""
        weight = self.word_embeddings.weight
        if self.group.size == 1:
            return _Lookup.apply(tokens, weight)
        box = weight.spec.box
        local = tokens - box.offset[0]
        elsewhere = (local < 0) | (local >= box.shape[0])
        # Every id has a row in exactly one rank's box, so the sum over ranks is that row.
        x = _Lookup.apply(local.masked_fill(elsewhere, 0), weight)
        x = x.masked_fill(elsewhere.unsqueeze(-1), 0.0)
        if self.sequence_parallel:
            return reduce_scatter_sequence(x, self.group)
        return reduce_from_tensor_region(x, self.group)
