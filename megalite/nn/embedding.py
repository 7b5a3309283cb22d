"""Word, position and token-type embeddings; the word embedding is split over tensor-parallel ranks by vocabulary."""

import torch
from torch import nn

from megalite.nn.config import ModelConfig
from megalite.nn.parameter import ParameterSpec, make_parameter
from megalite.parallel.boxes import Box
from megalite.parallel.collectives import reduce_from_tensor_region, reduce_scatter_sequence
from megalite.parallel.context import ParallelContext


def padded_vocabulary(vocab_size: int, divisible_by: int, tensor: int) -> int:
    """Rows of the word embedding over all ranks: v rounded up to a multiple of `divisible_by * tensor`."""
    multiple = divisible_by * tensor
    return -(-vocab_size // multiple) * multiple


def _rows_held(model: ModelConfig, context: ParallelContext) -> tuple[int, int, int]:
    """Of this rank's part of the vocabulary: rows in memory, first entry, entries without padding."""
    rows = padded_vocabulary(
        model.vocab_size, model.make_vocab_size_divisible_by, context.tensor.size
    )
    rows //= context.tensor.size
    start = min(rows * context.tensor.rank, model.vocab_size)
    return rows, start, min(rows, model.vocab_size - start)


def vocabulary_parameter(
    model: ModelConfig, context: ParallelContext, dtype, tied_copy: bool = False
) -> nn.Parameter:
    """This rank's rows [v_padded / t, h] of a [v, h] weight. The box leaves padding out; it may be empty."""
    rows, start, entries = _rows_held(model, context)
    box = Box((start, 0), (entries, model.hidden_size))
    spec = ParameterSpec(
        (model.vocab_size, model.hidden_size),
        box,
        True,
        "normal",
        model.init_method_std,
        tied_copy=tied_copy,
    )
    return make_parameter((rows, model.hidden_size), spec, dtype, context.device)


def vocabulary_bias(model: ModelConfig, context: ParallelContext, dtype) -> nn.Parameter:
    """This rank's entries [v_padded / t] of a bias [v] of the output layer."""
    rows, start, entries = _rows_held(model, context)
    spec = ParameterSpec(
        (model.vocab_size,), Box((start,), (entries,)), True, "zeros", weight_decay=False
    )
    return make_parameter((rows,), spec, dtype, context.device)


class _Lookup(torch.autograd.Function):
    """Rows of a weight [v, h] by ids. Its gradient is summed in fp32 at least: torch's own sums bf16 in bf16 on the
    CPU, where a frequent token's gradient stops growing."""

    @staticmethod
    def forward(ctx, ids, weight):
        ctx.save_for_backward(ids)
        ctx.weight = weight
        return nn.functional.embedding(ids, weight)

    @staticmethod
    def backward(ctx, grad):
        (ids,) = ctx.saved_tensors
        main = getattr(ctx.weight, "main_grad", None)
        dtype = torch.float32 if ctx.weight.dtype == torch.bfloat16 else ctx.weight.dtype
        total = torch.ops.aten.embedding_dense_backward(
            grad.to(dtype), ids, ctx.weight.shape[0], -1, False
        )
        if main is None:
            return None, total.to(ctx.weight.dtype)
        main.add_(total)
        return None, None


class VocabParallelWeight(nn.Module):
    """A [v, h] weight split by rows: of the word embedding, of its tied copy, or of an output layer."""

    def __init__(
        self, model: ModelConfig, context: ParallelContext, dtype, tied_copy: bool = False
    ):
        super().__init__()
        self.weight = vocabulary_parameter(model, context, dtype, tied_copy)


class SmallEmbedding(nn.Module):
    """A learned table [rows, h], of positions or token types; every tensor-parallel rank holds all of it."""

    def __init__(
        self,
        rows: int,
        model: ModelConfig,
        context: ParallelContext,
        dtype,
        sequence_parallel: bool,
    ):
        super().__init__()
        shape = (rows, model.hidden_size)
        spec = ParameterSpec(
            shape,
            Box.whole(shape),
            False,
            "normal",
            model.init_method_std,
            sequence_partial=sequence_parallel,
        )
        self.weight = make_parameter(shape, spec, dtype, context.device)


class Embedding(nn.Module):
    """Token ids [b, s] -> hidden states [s, b, h], or this rank's part [s/t, b, h] under sequence parallelism.

    token_types: how many types of tokens there are; 0: no table for them.
    """

    def __init__(
        self,
        model: ModelConfig,
        context: ParallelContext,
        dtype,
        sequence_parallel: bool,
        token_types: int = 0,
    ):
        super().__init__()
        self.group = context.tensor
        self.sequence_parallel = sequence_parallel and self.group.size > 1
        self.word_embeddings = VocabParallelWeight(model, context, dtype)
        parts = (model, context, dtype, self.sequence_parallel)
        self.position_embeddings = self.token_type_embeddings = None
        if model.position_embedding_type == "learned_absolute":
            self.position_embeddings = SmallEmbedding(model.positions, *parts)
        if token_types:
            self.token_type_embeddings = SmallEmbedding(token_types, *parts)

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor | None = None,
        token_types: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Look up and sum over ranks: ids that another rank holds contribute zeros here. `positions` [b, s] choose rows
        of the learned table; None: 0 to s - 1. `token_types` [b, s] choose rows of the other; None: all of type 0."""
        weight = self.word_embeddings.weight
        tokens = tokens.t()
        length = tokens.shape[0]
        if self.group.size == 1:
            x = _Lookup.apply(tokens, weight)
        else:
            local = tokens - weight.spec.box.offset[0]
            elsewhere = (local < 0) | (local >= weight.spec.box.shape[0])
            x = _Lookup.apply(local.masked_fill(elsewhere, 0), weight)
            x = x.masked_fill(elsewhere.unsqueeze(-1), 0.0)
            reduce = (
                reduce_scatter_sequence if self.sequence_parallel else reduce_from_tensor_region
            )
            x = reduce(x, self.group)
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
