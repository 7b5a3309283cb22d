"""GPT: the part of it that one rank holds, as one module."""

import torch
from torch import nn

from megalite.nn.block import Block
from megalite.nn.config import ModelConfig, RecomputeConfig
from megalite.nn.dropout import EMBEDDING, HiddenDropout
from megalite.nn.embedding import Embedding, VocabularyWeight
from megalite.nn.init import initialize
from megalite.nn.linear import column_parallel_linear
from megalite.nn.loss import vocab_parallel_cross_entropy
from megalite.nn.norm import Norm
from megalite.nn.parameter import name_parameters
from megalite.nn.recompute import recompute
from megalite.nn.rope import rotary_table
from megalite.parallel.context import ParallelContext
from megalite.parallel.rng import Rng


class TiedCopy(nn.Module):
    """The last stage's copy of the word embedding, under the name of the original."""

    def __init__(self, model: ModelConfig, context: ParallelContext, dtype):
        super().__init__()
        self.word_embeddings = VocabularyWeight(model, context, dtype, tied_copy=True)


class GPT(nn.Module):
    """One pipeline stage of a GPT: embedding on the first, layers, final norm and output layer on the last.

    Parameter names count layers in the whole model, so they are the same in every layout. All stages of one model are
    made with the same configuration; `layers` is this stage's range.
    """

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
        if model.vocab_size is None or (model.hidden_size % model.num_attention_heads and model.kv_channels is None):
            raise ValueError(
                f"a GPT needs a vocab_size (it is {model.vocab_size}) and a hidden_size {model.hidden_size} that its "
                f"{model.num_attention_heads} heads divide, or kv_channels"
            )
        self.config, self.context, self.rng, self.dtype = model, context, rng, dtype
        self.sequence_parallel = sequence_parallel and context.tensor.size > 1
        self.recompute_config = recompute_config = recompute_config or RecomputeConfig()
        first, last = context.is_first_stage, context.is_last_stage
        if first:
            self.embedding = Embedding(model, context, dtype, sequence_parallel)
            self.embedding_dropout = HiddenDropout(model.hidden_dropout, rng, 0, EMBEDDING, context, sequence_parallel)
        elif last and model.tied:
            self.embedding = TiedCopy(model, context, dtype)
        self.layers = nn.ModuleDict(
            {str(i): Block(model, recompute_config, context, rng, i, dtype, sequence_parallel) for i in layers}
        )
        if last:
            self.final_norm = Norm(model, context, dtype, sequence_parallel)
            if not model.tied:
                self.output = VocabularyWeight(model, context, dtype)
        self.parameters_by_name = name_parameters(self)
        initialize(self.parameters_by_name, seed)
        self._rotary_table = None

    def hidden_shape(self, microbatch: int) -> tuple[int, int, int]:
        """Shape of what passes between stages: [s, b, h], or [s/t, b, h] under sequence parallelism."""
        length = self.config.seq_length // (self.context.tensor.size if self.sequence_parallel else 1)
        return length, microbatch, self.config.hidden_size

    def forward(
        self,
        x: torch.Tensor,
        labels: torch.Tensor | None = None,
        loss_mask: torch.Tensor | None = None,
        samples: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One stage's share of the forward pass.

        x: token ids [b, s] on the first stage, hidden states from the previous stage on the others. Gives hidden
        states, except on the last stage: there the sum over unmasked tokens of the cross-entropy of `labels` [b, s]
        under `loss_mask` [b, s], or without labels the logits of the vocabulary this rank holds, [s, b, v/t].
        `samples` [b] are the rows' numbers in the whole run, which dropout of the layout-independent scheme needs.
        """
        if self.context.is_first_stage:
            length = x.shape[1]
            x = self.embedding_dropout(self.embedding(x), samples)
        else:
            length = x.shape[0] * (self.context.tensor.size if self.sequence_parallel else 1)
        x = self._run_layers(x, self._rotary(length), samples)
        if not self.context.is_last_stage:
            return x
        weight = self.embedding.word_embeddings.weight if self.config.tied else self.output.weight
        logits = column_parallel_linear(self.final_norm(x), weight, None, self.context.tensor, self.sequence_parallel)
        if labels is None:
            return logits
        losses = vocab_parallel_cross_entropy(logits, labels.t(), weight.spec, self.context.tensor)
        return (losses * loss_mask.t()).sum()

    def _rotary(self, length: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The rotary table of the whole sequence, made at its first use for a length; None with other positions."""
        model = self.config
        if model.position_embedding_type != "rope":
            return None
        if self._rotary_table is None or self._rotary_table[0].shape[0] != length:
            device = self.context.device
            self._rotary_table = rotary_table(length, model.head_size, model.rotary_base, self.dtype, device)
        return self._rotary_table

    def _run_layers(self, x: torch.Tensor, rotary, samples) -> torch.Tensor:
        """This stage's layers, in groups that are recomputed as a whole where the configuration says so."""
        layers, config = list(self.layers.values()), self.recompute_config
        full = config.granularity == "full" and torch.is_grad_enabled()
        n = config.recompute_num_layers
        whole = full and config.recompute_method == "uniform"
        groups = [layers[i : i + n] for i in range(0, len(layers), n)] if whole else [[layer] for layer in layers]
        for index, group in enumerate(groups):

            def run(x, group=group):
                for layer in group:
                    x = layer(x, rotary, samples)
                return x

            x = recompute(run, self.rng, x) if whole or (full and index < n) else run(x)
        return x
