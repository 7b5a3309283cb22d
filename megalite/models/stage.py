"""What the stages of every model share: a range of layers, positions, recomputation, names and initial weights."""

from typing import ClassVar

import torch
from torch import nn

from megalite.models.batch import Microbatch
from megalite.nn.block import Block
from megalite.nn.config import ModelConfig, RecomputeConfig
from megalite.nn.dropout import EMBEDDING, HiddenDropout
from megalite.nn.embedding import Embedding, VocabParallelWeight
from megalite.nn.init import initialize
from megalite.nn.norm import Norm
from megalite.nn.parameter import name_parameters
from megalite.nn.recompute import recompute
from megalite.nn.rope import rotary_table, table_at
from megalite.parallel.context import ParallelContext
from megalite.parallel.rng import Rng


class TiedCopy(nn.Module):
    """The last stage's copy of the word embedding, under the name of the original."""

    def __init__(self, model: ModelConfig, context: ParallelContext, dtype):
        super().__init__()
        self.word_embeddings = VocabParallelWeight(model, context, dtype, tied_copy=True)


class Stage(nn.Module):
    """One pipeline stage of a model: embedding on the first, layers, final norm and heads on the last.

    Parameter names count layers in the whole model, so they are the same in every layout. All stages of one model are
    made with the same configuration; `layers` is this stage's range. A model says in `build_heads` what else its last
    stage holds, in `forward` what it computes, and in `loss_counts` over how many items of a microbatch each of the k
    terms of its loss is a sum, fp64 [k].
    """

    causal: ClassVar[bool]
    """Whether a token sees only those before it."""
    token_types: ClassVar[int] = 0
    """Rows of the table of token types; 0: none."""
    loss_names: tuple[str, ...]
    """Terms of the loss, whose sum is trained: what the last stage returns sums of, in this order."""
    score_names: tuple[str, ...] = ()
    """Scores in evaluation mode, none or one for each term: the last stage then returns their sums after the terms'. A
    score's mean is over the items of its term."""

    def __init__(
        self,
        model: ModelConfig,
        context: ParallelContext,
        rng: Rng,
        layers: range,
        dtype: torch.dtype = torch.float32,
        sequence_parallel: bool = False,
        recompute_config: RecomputeConfig | None = None,
        seed: int = 1234,
    ):
        super().__init__()
        if model.vocab_size is None or (
            model.hidden_size % model.num_attention_heads and model.kv_channels is None
        ):
            raise ValueError(
                f"a {type(self).__name__} needs a vocab_size (it is {model.vocab_size}) and a hidden_size "
                f"{model.hidden_size} that its {model.num_attention_heads} heads divide, or kv_channels"
            )
        self.config, self.context, self.rng, self.dtype = model, context, rng, dtype
        self.sequence_parallel = sequence_parallel and context.tensor.size > 1
        self.recompute_config = recompute_config = recompute_config or RecomputeConfig()
        shared = (model, context, dtype, self.sequence_parallel)
        first, last = context.is_first_stage, context.is_last_stage
        if first:
            self.embedding = Embedding(*shared, self.token_types)
            self.embedding_norm = Norm(*shared) if model.post_norm else nn.Identity()
            self.embedding_dropout = HiddenDropout(
                model.hidden_dropout, rng, 0, EMBEDDING, context, sequence_parallel
            )
        elif last and model.tied:
            self.embedding = TiedCopy(model, context, dtype)
        parts = (model, recompute_config, context, rng)
        self.layers = nn.ModuleDict(
            {str(i): Block(*parts, i, *shared[2:], causal=self.causal) for i in layers}
        )
        if last:
            self.final_norm = nn.Identity() if model.post_norm else Norm(*shared)
            self.build_heads()
            if not model.tied:
                self.output = VocabParallelWeight(model, context, dtype)
        self.parameters_by_name = name_parameters(self)
        initialize(self.parameters_by_name, seed)
        self._rotary_table = None

    def build_heads(self) -> None:
        """Make the modules that come after the final norm, but for the output weight."""

    def hidden_shape(self, microbatch: int) -> tuple[int, int, int]:
        """Shape of what passes between stages: [s, b, h], or [s/t, b, h] under sequence parallelism."""
        length = self.config.seq_length // (
            self.context.tensor.size if self.sequence_parallel else 1
        )
        return length, microbatch, self.config.hidden_size

    @property
    def inputs(self) -> set[str]:
        """Fields of a microbatch that this stage reads from the data, where the data has them."""
        rope = self.config.position_embedding_type == "rope"
        learned = self.config.position_embedding_type == "learned_absolute"
        fields = {"segments"}
        if rope or (learned and self.context.is_first_stage):
            fields |= {"positions"}
        if self.context.is_first_stage:
            fields |= {"tokens"}
        if self.context.is_last_stage:
            fields |= {"labels", "loss_mask"}
        return fields

    @property
    def output_weight(self) -> nn.Parameter:
        """[v/t, h] of the output layer, on the last stage."""
        return self.embedding.word_embeddings.weight if self.config.tied else self.output.weight

    def hidden(
        self, x: torch.Tensor | None, batch: Microbatch, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """This stage's share of the transformer: hidden states, after the final norm on the last stage.

        x: those of the previous stage; None on the first, which starts from the batch's tokens. mask: which tokens see
        which, as of `attention_mask`; None: all that the model's kind lets them.
        """
        if self.context.is_first_stage:
            length = batch.tokens.shape[1]
            x = self.embedding_norm(
                self.embedding(batch.tokens, batch.positions, batch.token_types)
            )
            x = self.embedding_dropout(x, batch.samples)
        else:
            length = x.shape[0] * (self.context.tensor.size if self.sequence_parallel else 1)
        x = self._run_layers(x, self._rotary(length, batch.positions), mask, batch.samples)
        return self.final_norm(x) if self.context.is_last_stage else x

    def _rotary(
        self, length: int, positions: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The rotary table of the whole sequence, made at its first use for a length, or its rows for each token's
        position; None with other kinds of positions."""
        model = self.config
        if model.position_embedding_type != "rope":
            return None
        if self._rotary_table is None or self._rotary_table[0].shape[0] != length:
            device = self.context.device
            self._rotary_table = rotary_table(
                length, model.head_size, model.rotary_base, self.dtype, device
            )
        return self._rotary_table if positions is None else table_at(self._rotary_table, positions)

    def _run_layers(self, x: torch.Tensor, rotary, mask, samples) -> torch.Tensor:
        """This stage's layers, in groups that are recomputed as a whole where the configuration says so."""
        layers, config = list(self.layers.values()), self.recompute_config
        full = config.granularity == "full" and torch.is_grad_enabled()
        n = config.recompute_num_layers
        whole = full and config.recompute_method == "uniform"
        groups = (
            [layers[i : i + n] for i in range(0, len(layers), n)]
            if whole
            else [[layer] for layer in layers]
        )
        for index, group in enumerate(groups):

            def run(x, group=group):
                for layer in group:
                    x = layer(x, rotary, mask, samples)
                return x

            x = recompute(run, self.rng, x) if whole or (full and index < n) else run(x)
        return x
