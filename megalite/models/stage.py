"""What the stages of every model share: a range of layers, positions, recomputation, names and
initial weights."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from megalite.models.batch import Microbatch
from megalite.nn.block import Block
from megalite.nn.dropout import EMBEDDING, HiddenDropout
from megalite.nn.embedding import Embedding, VocabParallelWeight
from megalite.nn.init import initialize
from megalite.nn.norm import Norm
from megalite.nn.parameter import name_parameters
from megalite.nn.recompute import recompute
from megalite.nn.rope import RotaryTable, model_frequencies, rotary_table, table_at
from megalite.nn.settings import LayerSettings


class TiedCopy(nn.Module):
    """The last stage's copy of the word embedding, or the embedding itself if this rank holds the
    first stage too; under the name of the original."""

    def __init__(self, settings: LayerSettings, first: "Stage | None"):
        super().__init__()
        if first is None:
            self.word_embeddings = VocabParallelWeight(settings, tied=True)
        else:
            self.word_embeddings = first.embedding.word_embeddings


class Stage(nn.Module):
    """A range of a model's layers as one module: with the embedding if it holds the first layer,
    with the final norm and the heads if it holds the last.

    A pipeline is a chain of stages, and a rank holds one or several. Parameter names count layers
    in the whole model, so they are the same in every layout. A subclass makes the other modules of
    its last stage in `build_heads`, computes the stage's share in `forward`, and gives in
    `loss_counts` the number of items of a microbatch that each of the k terms of its loss sums
    over, fp64 [k].

    Args:
        settings: what all layers share; all stages of one model are made with the same.
        layers: the layers that this stage holds, at least one; None: all.
        seed: of the initial weights.
        first: the first stage, if this is another one on the same rank: they share a tied
            embedding.

    Raises ValueError when the settings' model has no vocabulary size, or heads that do not divide
    its width.
    """

    causal: ClassVar[bool]
    """Whether a token sees only those before it and itself."""
    token_types: ClassVar[int] = 0
    """Rows of the table of token types; 0: none."""
    loss_names: tuple[str, ...]
    """Terms of the loss, whose sum is trained: what the last stage returns sums of, in this
    order."""
    score_names: tuple[str, ...] = ()
    """Scores in evaluation mode, none or one for each term: the last stage then returns their sums
    after the terms'. A score's mean is over the items of its term."""

    def __init__(
        self,
        settings: LayerSettings,
        layers: range | None = None,
        seed: int = 1234,
        first: "Stage | None" = None,
    ):
        super().__init__()
        model = settings.model
        whole_heads = model.hidden_size % model.num_attention_heads == 0
        if model.vocab_size is None or not (whole_heads or model.kv_channels):
            raise ValueError(
                f"a {type(self).__name__} needs a vocab_size (it is {model.vocab_size}) and a "
                f"hidden_size {model.hidden_size} that its {model.num_attention_heads} heads "
                "divide, or kv_channels"
            )
        if layers is None:
            layers = range(model.num_layers)
        self.settings = settings
        self.model_config = model
        self.context = settings.context
        self.is_first = 0 in layers
        self.is_last = model.num_layers - 1 in layers
        self.numbers = list(layers)
        """Of the layers, in the whole model."""
        self._rotary_table = None

        # Before the layers. The last of several stages has a copy of a tied embedding, for its
        # output layer.
        if self.is_first:
            self.embedding = Embedding(settings, self.token_types)
            self.embedding_norm = Norm(settings) if model.post_norm else nn.Identity()
            self.embedding_dropout = HiddenDropout(settings, 0, EMBEDDING)
        elif self.is_last and model.tied:
            self.embedding = TiedCopy(settings, first)
        # Keys are numbers in the whole model, so a layer has the same name in every layout.
        self.layers = nn.ModuleDict({str(i): Block(settings, i, self.causal) for i in layers})
        if self.is_last:
            # After the layers. Post-norm layers end with a norm of their own.
            self.final_norm = nn.Identity() if model.post_norm else Norm(settings)
            self.build_heads()
            if not model.tied:
                self.output = VocabParallelWeight(settings)

        self.parameters_by_name = name_parameters(self)
        made = dict(self.parameters_by_name)
        if first is not None:
            for name in first.parameters_by_name:
                made.pop(name, None)
        initialize(made, seed)

    def build_heads(self) -> None:
        """Make the modules that come after the final norm, except the output weight."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the hidden states that pass between stages."""
        return self.settings.dtype

    def hidden_shape(self, microbatch: int) -> tuple[int, int, int]:
        """Shape of what passes between stages: [s, b, h], or [s/t, b, h] under sequence
        parallelism."""
        length = self.model_config.seq_length
        if self.settings.sequence_parallel:
            length //= self.settings.tensor.size
        return length, microbatch, self.model_config.hidden_size

    @property
    def inputs(self) -> set[str]:
        """Fields of a microbatch that this stage reads from the data, where the data has them."""
        kind = self.model_config.position_embedding_type
        fields = {"segments"}
        if kind == "rope" or (kind == "learned_absolute" and self.is_first):
            fields |= {"positions"}
        if self.is_first:
            fields |= {"tokens"}
        if self.is_last:
            fields |= {"labels", "loss_mask"}
        return fields

    @property
    def output_weight(self) -> nn.Parameter:
        """[v/t, h] of the output layer, on the last stage."""
        holder = self.embedding.word_embeddings if self.model_config.tied else self.output
        return holder.weight

    def hidden(self, x: Tensor | None, batch: Microbatch, mask: Tensor | None) -> Tensor:
        """This stage's share of the transformer: hidden states, after the final norm on the last
        stage.

        x: those of the previous stage; None on the first, which starts from the batch's tokens.
        mask: which tokens see which, as `attention_mask` gives it; None: all that the kind of model
        lets them.
        """
        if self.is_first:
            length = batch.tokens.shape[1]
            x = self.embedding(batch.tokens, batch.positions, batch.token_types)
            x = self.embedding_dropout(self.embedding_norm(x), batch.samples)
        else:
            # Rotary angles are those of whole sequences, as `hidden_shape` has them: attention
            # gathers the shards of sequence parallelism.
            length = self.model_config.seq_length
        x = self._run_layers(x, self._rotary(length, batch.positions), mask, batch.samples)
        return self.final_norm(x) if self.is_last else x

    def _rotary(self, length: int, positions: Tensor | None) -> RotaryTable | None:
        """The rotary table of the whole sequence, made at its first use for a length, or its rows
        for each token's position; None with other kinds of positions."""
        model = self.model_config
        if model.position_embedding_type != "rope":
            return None
        if self._rotary_table is None or self._rotary_table[0].shape[0] != length:
            frequencies = model_frequencies(model, self.context.device)
            self._rotary_table = rotary_table(length, frequencies, self.dtype)
        return self._rotary_table if positions is None else table_at(self._rotary_table, positions)

    def _run_layers(self, x: Tensor, rotary, mask, samples) -> Tensor:
        """This stage's layers, in groups that are recomputed as a whole where the configuration
        says so."""
        recompute_config = self.settings.recompute
        layers = list(self.layers.values())
        full = recompute_config.granularity == "full" and torch.is_grad_enabled()
        # By the uniform method every group of n layers is recomputed together; by the block method
        # the first n layers are, each on its own.
        uniform = full and recompute_config.recompute_method == "uniform"
        group_size = recompute_config.recompute_num_layers if uniform else 1
        recomputed = 0
        if full:
            recomputed = len(layers) if uniform else recompute_config.recompute_num_layers
        for first in range(0, len(layers), group_size):
            # The group is bound now: the backward calls this again, after the loop has gone on.
            def run(x, group=tuple(layers[first : first + group_size])):
                for layer in group:
                    x = layer(x, rotary, mask, samples)
                return x

            x = recompute(run, self.settings.rng, x) if first < recomputed else run(x)
        return x
