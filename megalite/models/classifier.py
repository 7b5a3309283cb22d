"""A BERT that classifies texts or pairs of texts, in one process."""

from dataclasses import replace

import torch

from megalite.models.batch import Microbatch
from megalite.models.bert import BertEncoder
from megalite.nn.config import ModelConfig
from megalite.nn.dropout import EMBEDDING, HiddenDropout
from megalite.nn.linear import ReplicatedLinear
from megalite.nn.settings import LayerSettings
from megalite.parallel.context import ParallelContext
from megalite.parallel.rng import CounterBasedRng


class Classifier(BertEncoder):
    """The encoder and the pooler of a BERT, then dropout and a linear layer (Devlin et al. 2018).

    Args:
        model: shape of the encoder.
        context: the context of a single rank.
        classes: c, the number of classes.
        dropout: dropout of the pooled output. The encoder keeps that of `model`.
        freeze_encoder: train pooler and linear layer only; the encoder then has no dropout.
        seed: seed of the initial weights and of dropout.
    """

    heads = ("pooler", "head_dropout", "classifier")
    """Modules after the encoder."""

    def __init__(
        self,
        model: ModelConfig,
        context: ParallelContext,
        classes: int,
        dropout: float = 0.0,
        freeze_encoder: bool = False,
        seed: int = 1234,
    ):
        # Before nn.Module's own: build_heads needs them.
        self.classes = classes
        self.head_dropout_probability = dropout
        self.freeze_encoder = freeze_encoder
        # Tied, since then there is no weight of an output layer, which a classifier does not have.
        model = replace(model, untie_embeddings_and_output_weights=False)
        settings = LayerSettings(model, context, CounterBasedRng.for_seed(seed))
        super().__init__(settings, seed=seed)
        for name, parameter in self.parameters_by_name.items():
            parameter.requires_grad_(not freeze_encoder or name.split(".")[0] in self.heads)

    def build_heads(self) -> None:
        """Pooler, dropout at a site that no layer uses, and the linear layer."""
        hidden = self.model_config.hidden_size
        self.pooler = ReplicatedLinear(self.settings, hidden, hidden)
        site = (self.model_config.num_layers, EMBEDDING)
        self.head_dropout = HiddenDropout(self.settings, *site, self.head_dropout_probability)
        self.classifier = ReplicatedLinear(self.settings, hidden, self.classes, bias=True)

    def train(self, mode: bool = True) -> "Classifier":
        """Set the training mode of the modules that are trained, or evaluation mode."""
        super().train(mode)
        for name, module in self.named_children():
            module.train(mode and (not self.freeze_encoder or name in self.heads))
        return self

    def forward(self, batch: Microbatch) -> torch.Tensor:
        """Logits [b, c] of tokens, token types and segments [b, s].

        In training mode, the sample numbers [b] of the batch determine what dropout drops.
        """
        pooled = self.pooled(self.encode(None, batch))
        # Dropout takes hidden states [s, b, h]: here one position, [1, b, h].
        return self.classifier(self.head_dropout(pooled.unsqueeze(0), batch.samples).squeeze(0))
